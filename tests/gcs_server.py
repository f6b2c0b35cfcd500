"""Google Cloud Storage on loopback: gcp-storage-emulator, with what tensorstore asks for besides.

A download's head has the object's generation, and what is read and written may depend on it (ifGenerationMatch,
ifGenerationNotMatch): the manifest of OCDBT rests on that.
"""

import http
import threading

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

CONDITIONAL = (objects.get, objects.insert, objects.delete, objects.download)
STANDARD = server.HANDLERS
_lock = threading.RLock()


def create_server(port, bucket):
    """A server with an empty bucket, in memory: a context manager."""
    server.HANDLERS = tuple((path, {method: _conditional(do) for method, do in by.items()}) for path, by in STANDARD)
    return server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)


def _conditional(handler):
    if handler not in CONDITIONAL:
        return handler

    def call(request, response, storage, *arguments, **options):
        with _lock:
            name = request.params.get("object_id") or (request.query.get("name") or [None])[0]
            now = _generation(storage, request.params["bucket_name"], name) if name else 0
            wanted, other = (request.query.get(f"ifGeneration{kind}", [None])[0] for kind in ("Match", "NotMatch"))
            if wanted is not None and int(wanted) != now:
                request.data  # noqa: B018  reads it off the connection
                gone = not now and handler is not objects.insert
                response.status = http.HTTPStatus.NOT_FOUND if gone else http.HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": int(response.status), "message": "conditionNotMet"}})
            elif other is not None and now and int(other) == now:
                response.status = http.HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage, *arguments, **options)
                if now and handler in (objects.get, objects.download):
                    response["x-goog-generation"] = str(now)
                    response["x-goog-metageneration"] = "1"

    return call


def _generation(storage, bucket, name):
    try:
        return int(storage.get_file_obj(bucket, name)["generation"])
    except (NotFound, KeyError, TypeError):
        return 0
