// The page to ask from. Nothing here comes from elsewhere, and what a model or a user says is shown as text, never as HTML.
const $ = id => document.getElementById(id);
const {model, maxTokens} = document.body.dataset;
const DARK = 0.4, VISIBLE = 0.35; // as in the figure of `hovle attention`
const FEWEST = 8; // tokens that a rate is computed from: a few arrive at once
let images = [], messages = [], running = null;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- images of the next message

function drawImages() {
  $("images").replaceChildren(...images.map((url, index) => {
    const button = make("button", {type: "button", ariaLabel: `Remove image ${index + 1}`}, make("img", {src: url, alt: ""}), "×");
    button.onclick = () => { images.splice(index, 1); drawImages(); $("files").focus(); };
    return make("li", {}, button);
  }));
}
const read = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});
async function addFiles(files) {
  const shown = [...files].filter(file => file.type.startsWith("image/"));
  if (files.length > shown.length) $("state").textContent = "only images can be added";
  images.push(...await Promise.all(shown.map(read)));
  drawImages();
}

// -- the server

async function post(path, body, signal) {
  const key = sessionStorage.getItem("key"), headers = {"Content-Type": "application/json"};
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, {method: "POST", signal, headers, body: JSON.stringify({model, ...body})});
  if (response.ok) return response;
  if (response.status === 401) { $("keyrow").hidden = false; $("key").focus(); }
  throw new Error((await response.json().catch(() => null))?.error?.message ?? `the server answered ${response.status}`);
}
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// -- the conversation

function show(role, text) {
  const said = make("p", {className: "said", textContent: text}), article = make("article", {className: role}, said);
  $("empty").hidden = true;
  $("talk").append(article);
  article.scrollIntoView({block: "nearest"});
  return {article, said};
}
const follow = () => {
  if (innerHeight + scrollY > document.body.scrollHeight - 160) scrollTo(0, document.body.scrollHeight);
};
async function answer(shown, progress) {
  const began = performance.now();
  const body = {messages, max_tokens: Number(maxTokens), stream: true, temperature: 0, stream_options: {include_usage: true}};
  for await (const event of events(await post("v1/chat/completions", body, running.signal))) {
    const text = event.choices[0]?.delta.content;
    if (text) {
      progress.first ||= performance.now();
      progress.said += text;
      shown.said.textContent = progress.said;
      follow();
    }
    if (event.usage) progress.tokens = event.usage.completion_tokens;
  }
  if (!progress.first) { shown.said.textContent = "(an empty answer)"; return "no text"; }
  const ended = performance.now(), {first, tokens} = progress, seconds = time => (time / 1000).toFixed(2);
  const parts = [`first text after ${seconds(first - began)} s`, `${tokens} token${tokens === 1 ? "" : "s"} in ${seconds(ended - began)} s`];
  if (tokens >= FEWEST) parts.push(`${(1000 * (tokens - 1) / (ended - first)).toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
function askedParts(text) {
  return [...images.map(url => ({type: "image_url", image_url: {url}})), {type: "text", text}];
}
function takeBack(asked, text, urls) {
  messages.pop();
  asked.article.remove();
  if (!$("prompt").value) $("prompt").value = text;
  images = [...urls, ...images];
  drawImages();
}
async function ask(text) {
  document.querySelectorAll(".failed").forEach(article => article.remove());
  const urls = images, conversation = messages = [...messages, {role: "user", content: askedParts(text)}];
  const asked = show("user", text), shown = show("assistant", "…"), progress = {said: "", first: 0, tokens: 0};
  asked.article.prepend(...urls.map(src => make("img", {src, alt: "an image that was asked about"})));
  images = []; drawImages(); $("prompt").value = "";
  shown.article.ariaLive = "polite";
  shown.article.ariaBusy = "true";
  busy(new AbortController());
  let line = "";
  try {
    line = await answer(shown, progress);
  } catch (error) {
    line = error.name === "AbortError" ? "stopped" : error.message;
    if (conversation === messages && !progress.said) {
      takeBack(asked, text, urls);
      shown.said.textContent = line;
      shown.said.classList.add("error");
      shown.article.classList.add("failed");
      line = "";
    }
  }
  busy(null);
  shown.article.ariaBusy = "false";
  if (line) shown.article.append(make("small", {className: "speed", textContent: line}));
  if (conversation === messages && progress.said) {
    messages = [...messages, {role: "assistant", content: progress.said}];
    if (messages.some(({content}) => typeof content !== "string" && content.length > 1)) shown.article.append(looker(messages));
  }
  follow();
  if ($("keyrow").hidden) $("prompt").focus({preventScroll: true});
}
function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("state").textContent = running ? "answering" : "";
}

// -- what the model saw

function looker(conversation) {
  const inside = make("div", {className: "look", ariaLive: "polite"});
  const details = make("details", {}, make("summary", {textContent: "What the model saw"}), inside);
  let asked = false;
  details.ontoggle = async () => {
    if (!details.open || asked) return;
    asked = true;
    inside.textContent = "looking";
    try {
      const maps = await (await post("v1/attention", {messages: conversation})).json();
      const tiles = await Promise.all(maps.tiles.map(load));
      drawLook(inside, maps, tiles);
    } catch (error) {
      asked = false;
      inside.replaceChildren(make("p", {className: "error", textContent: `${error.message}; close and open to try again`}));
    }
  };
  return details;
}
async function load(src) {
  const image = make("img", {src});
  await image.decode();
  return image;
}
let groups = 0;
function choices(title, names, onchange) {
  const name = `choice${++groups}`;
  return make("fieldset", {}, make("legend", {textContent: title}), ...names.map((text, index) => {
    const input = make("input", {type: "radio", name, checked: index === 0, onchange: () => onchange(index)});
    return make("label", {className: "button choice"}, input, text);
  }));
}
function drawLook(inside, maps, tiles) {
  const canvases = tiles.map(() => make("canvas", {role: "img"}));
  const numbers = make("small");
  let layer = 0, token = 0;
  const draw = () => {
    const of = maps.layers[layer], weights = token ? of.tokens[token - 1] : of.answer;
    const most = Math.max(...weights.flat(), Number.MIN_VALUE);
    tiles.forEach((tile, index) => drawTile(canvases[index], tile, weights[index], maps.grid, most));
    canvases.forEach((canvas, index) => canvas.setAttribute("aria-label", about(index, tiles.length, weights[index], maps.grid)));
    numbers.textContent = `Bright: where it looked. In this layer ${(100 * of.image_share).toFixed(1)}% of the text's attention is ` +
      `on images, with a sparsity of ${of.sparsity.toFixed(2)} (0: all parts alike; 1: one part alone).`;
  };
  const layers = maps.layers.map(({layer}) => `${layer} of ${maps.num_layers}`);
  inside.replaceChildren(
    choices("Layer", layers, index => { layer = index; draw(); }),
    choices("Answer", ["all of it", ...maps.tokens.map(text => text.trim() || "␣")], index => { token = index; draw(); }),
    ...blocks(maps.images, canvases), numbers);
  draw();
}
function blocks(images, canvases) {
  const rest = [...canvases];
  return images.map(({tiles, columns, thumbnail}) => {
    const block = make("div", {className: "tiles"}, ...rest.splice(0, tiles));
    block.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 14rem))`;
    if (thumbnail) block.lastChild.className = "thumbnail";
    return block;
  });
}
function drawTile(canvas, tile, weights, grid, most) {
  const cell = Math.max(1, Math.ceil(448 / grid)), side = canvas.width = canvas.height = cell * grid;
  const context = canvas.getContext("2d");
  context.drawImage(tile, 0, 0, side, side);
  weights.forEach((weight, index) => {
    const light = VISIBLE + (1 - VISIBLE) * (weight / most) ** DARK;
    context.fillStyle = `rgb(0 0 0 / ${1 - light})`;
    context.fillRect(index % grid * cell, Math.floor(index / grid) * cell, cell, cell);
  });
}
function about(index, count, weights, grid) {
  const at = weights.indexOf(Math.max(...weights)), sum = weights.reduce((a, b) => a + b, 0);
  return `Tile ${index + 1} of ${count}: ${(100 * sum).toFixed(1)}% of the attention, most at row ${Math.floor(at / grid) + 1}, ` +
    `column ${at % grid + 1} of ${grid}`;
}

// -- what a user does

$("form").onsubmit = event => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if ($("key").value) { sessionStorage.setItem("key", $("key").value); $("key").value = ""; $("keyrow").hidden = true; }
  if (text && !running) ask(text);
};
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
  if (event.key === "Escape") running?.abort();
};
$("stop").onclick = () => { running?.abort(); $("prompt").focus(); };
$("new").onclick = () => {
  running?.abort();
  messages = []; images = []; drawImages();
  $("talk").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
};
$("files").onchange = () => { addFiles($("files").files); $("files").value = ""; };
addEventListener("paste", event => { if (event.clipboardData.files.length) addFiles(event.clipboardData.files); });
addEventListener("dragover", event => { event.preventDefault(); $("form").classList.add("over"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) $("form").classList.remove("over"); });
addEventListener("drop", event => { event.preventDefault(); $("form").classList.remove("over"); addFiles(event.dataTransfer.files); });
