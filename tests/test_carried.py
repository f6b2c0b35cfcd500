"""What a checkpoint carries beside the state."""

import pytest

from hovle_jax.errors import UserError
from hovle_jax.training.carried import FILE_NAME, Carried, read_carried, write_carried


def of(value):
    return Carried([{"loss": value}], {"tokens_seen": 7}, evaluates=True)


def test_a_step_is_carried_as_long_as_it_has_a_checkpoint(tmp_path):
    assert read_carried(tmp_path, 3) is None
    for step in (3, 6, 9):
        write_carried(tmp_path, step, of(step / 7))
        if step != 6:  # that of step 6 is still on its way when step 9 is noted
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert [read_carried(tmp_path, step) for step in (3, 6, 9)] == [of(3 / 7), of(6 / 7), of(9 / 7)]
    write_carried(tmp_path, 12, of(1.0))
    assert read_carried(tmp_path, 6) is None and read_carried(tmp_path, 3) == of(3 / 7)


def test_a_run_that_goes_back_forgets_what_it_makes_again(tmp_path):
    for step in (3, 6, 9, 4):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        write_carried(tmp_path, step, of(float(step)))
    assert [read_carried(tmp_path, step) is not None for step in (3, 4, 6, 9)] == [True, True, False, False]


def test_a_damaged_file_is_named_with_its_remedy(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"3"')
    with pytest.raises(UserError, match=f"{FILE_NAME} is cut short or damaged.*remove it"):
        read_carried(tmp_path, 3)
