const $ = (id) => document.getElementById(id);
const OTHER = "\0other"; // of a list: what is typed
let info = null, offer = null, running = null, choosing = null, loads = 0, picture = null, painted = false;

// The server

function headers() {
  const key = sessionStorage.getItem("latentdiff-key");
  return key ? { Authorization: "Bearer " + key } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.ok) return answer;
  if (answer.status === 401) { $("key").hidden = false; $("password").focus(); }
  const body = await answer.json().catch(() => null);
  throw new Error(answer.status === 401 ? "Say the password." : body?.error?.message ?? "The server answered " + answer.status + ".");
}

async function post(path, values) { return (await ask(path, { method: "POST", body: JSON.stringify(values) })).json(); }

function inWords(error) { return error instanceof TypeError ? "The server does not answer; is it still running?" : error.message; }

async function start() {
  try { await offered(); } catch (error) { return say(inWords(error), true); }
  const first = offer.models[0];
  if (first.steps) await described(first); else await chooseModel(first.id);
  watch();
}

async function offered() { // what can be chosen now
  offer = await (await ask("/page")).json();
  const names = offer.models.map((one) => one.id), folders = offer.folders.length > 0;
  list($("model"), names, folders ? "another, within the folders ..." : null);
  list($("base"), names, null);
  list($("lora"), ["", ...offer.loras], null);
  $("lora").options[0].textContent = "none";
  $("style").hidden = !offer.loras.length;
  $("scoring").hidden = !offer.scores;
  $("unnamed").hidden = folders;
  for (const id of ["look", "begin"]) $(id).disabled = !folders;
  $("places").replaceChildren(...offer.folders.map((one) => new Option(one)));
}

function list(select, names, other) {
  const chosen = select.value;
  select.replaceChildren(...names.map((one) => new Option(one, one)), ...(other ? [new Option(other, OTHER)] : []));
  if (names.includes(chosen) || (other && chosen === OTHER)) select.value = chosen;
}

function chooseModel(name) {
  const mine = choosing = loaded(name, ++loads, $("model").value === OTHER).finally(() => { if (choosing === mine) choosing = null; });
  return mine;
}

async function loaded(name, number, typed) { // whether it may be drawn with; of several the last is
  say("Loading " + name + " ...");
  try {
    const found = await post("/page/model", { model: name });
    if (!offer.models.some((one) => one.id === found.id)) await offered();
    if (number === loads) await described(found);
    return true;
  } catch (error) {
    if (number !== loads) return true;
    say(inWords(error), true);
    if (info && !typed) $("model").value = info.id; // what was typed stays, to be mended
    return false;
  }
}

async function chosen() { // whether there is a model to draw with, when it is loaded
  while (choosing) if (!await choosing) return false;
  if ($("model").value !== OTHER) return info !== null;
  const name = $("typed").value.trim();
  if (name) return chooseModel(name);
  say("Name a model: its folder or file, within the folders named at start.", true);
  $("typed").focus();
  return false;
}

async function described(model) {
  info = model;
  $("model").value = info.id; $("typing").hidden = true;
  for (const side of ["width", "height"]) {
    const own = info[side], m = info.multiple_of;
    const sides = [0.5, 0.75, 1, 1.25, 1.5, 2].map((scale) => Math.max(1, Math.round(own * scale / m)) * m);
    $(side).replaceChildren(...[...new Set(sides)].map((one) => new Option(one + (one === own ? " (the model's)" : ""), one, false, one === own)));
  }
  $("steps").max = info.fixed_steps ? info.steps : info.limits.steps; $("steps").value = info.steps; $("steps").disabled = info.fixed_steps;
  leastAnew();
  $("guidance").value = info.guidance_scale; $("count").max = info.limits.count;
  $("strength").parentElement.hidden = !info.takes_strength;
  guided();
  say("");
  if (picture) await fitted();
}

function sized() { return $("width").value + "x" + $("height").value; }

function say(text, error = false) { $("said").textContent = text; $("said").className = error ? "error" : ""; }

// Drawing

function fields() {
  const asked = { prompt: $("prompt").value, model: info.id, n: +$("count").value, seed: +$("seed").value, stream: true,
    guidance_scale: +$("guidance").value, partial_images: info.limits.steps };
  if ($("negative").value.trim() && !$("negative").disabled) asked.negative_prompt = $("negative").value;
  if ($("lora").value) asked.lora = $("lora").value + ":" + (+$("lora-scale").value);
  if ($("scores").checked && offer.scores) asked.scores = true;
  if (!info.fixed_steps) asked.steps = +$("steps").value;
  if (picture && info.takes_strength) asked.strength = +$("strength").value;
  if (sized() !== picture?.size) asked.size = sized(); // else its own rule keeps the picture's pixels
  return asked;
}

async function request() {
  const asked = fields();
  if (!picture) return ask("/v1/images/generations", { method: "POST", body: JSON.stringify(asked), signal: running.signal });
  const form = new FormData();
  for (const [name, value] of Object.entries(asked)) form.append(name, value);
  form.append("image", picture.blob, picture.name);
  if (painted) form.append("mask", await maskBlob(), "mask.png");
  return ask("/v1/images/edits", { method: "POST", body: form, signal: running.signal });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

function waiting(controller) { // says how long the queue is, until something is drawn
  let over = false;
  (async () => {
    for (say("Waiting for its turn ..."); !over && !controller.signal.aborted; await new Promise((go) => setTimeout(go, 700))) {
      const queue = await ask("/health").then((one) => one.json()).catch(() => null);
      if (!over && running === controller && queue?.waiting) say("Waiting for its turn: " + queue.waiting + " in the queue, " + queue.drawing + " being drawn ...");
    }
  })();
  return () => { over = true; };
}

async function draw() {
  if (!info && !choosing) { await start(); if (!info) return; }
  const controller = running = new AbortController();
  busy(true);
  if (!await chosen()) return busy(false);
  if ($("fresh").checked) roll();
  const began = waiting(controller);
  const count = +$("count").value, shown = Array.from({ length: count }, () => ({ ...tile(), frames: [] }));
  $("now").replaceChildren(...shown.map((one) => one.figure));
  if (matchMedia("(max-width: 760px)").matches) $("now").scrollIntoView({ behavior: "smooth" });
  const finished = [];
  try {
    for await (const event of events(await request())) {
      began();
      if (event.error) throw new Error(event.error.message);
      const image = "data:image/png;base64," + event.b64_json, one = shown[event.index];
      one.image.src = image; one.frames.push(image);
      if (event.type.endsWith("partial_image")) {
        $("bar").value = event.step / event.steps;
        one.caption.textContent = "step " + event.step + " of " + event.steps;
        say("Drawing ...");
      } else {
        one.figure.remove();
        finished.push({ figure: keep(image, noteOf(event), one.frames, event.warnings), score: event.score ?? -1 });
      }
    }
    ranked(finished);
    say(finished.length < count ? "The server stopped before it was finished." : "", finished.length < count);
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : inWords(error), error.name !== "AbortError");
    $("now").replaceChildren();
  }
  began();
  busy(false);
}

function busy(now) {
  if (!now) running = null;
  $("draw").disabled = now; $("stop").disabled = $("bar").hidden = !now; $("bar").removeAttribute("value");
}

function noteOf(event) {
  if (event.not_finite) return "spoilt: values that are not finite";
  if (event.withheld) return "withheld by the model's safety checker";
  return event.score == null ? "" : "CLIP score " + event.score.toFixed(1);
}

function ranked(finished) { // the best of one drawing first
  if (finished.some((one) => one.score >= 0)) $("gallery").prepend(...finished.sort((a, b) => b.score - a.score).map((one) => one.figure));
}

function tile() {
  const figure = document.createElement("figure"), image = new Image(), caption = document.createElement("figcaption");
  image.alt = "being drawn"; image.style.aspectRatio = $("width").value + "/" + $("height").value;
  figure.append(image, caption);
  return { figure, image, caption };
}

function guided() { // without guidance a negative prompt has no effect
  $("negative").disabled = +$("guidance").value <= 1;
  $("negative").placeholder = $("negative").disabled ? "needs guidance above 1" : "";
}

function leastAnew() { // one step at least is run
  if (+$("steps").value >= 1) $("strength").min = Math.ceil(20 / $("steps").value) / 20;
  share();
}

function roll() { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; }

function turn(train) {
  $("drawing").hidden = train; $("training").hidden = !train;
  $("to-draw").className = train ? "" : "on"; $("to-train").className = train ? "on" : "";
  if (train && trained?.curves) plot(trained.curves); // whose width is known only now
}

$("form").onsubmit = (event) => { event.preventDefault(); if (!running) draw(); };
$("prompt").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); } };
$("stop").onclick = () => running?.abort();
$("dice").onclick = () => { roll(); $("fresh").checked = false; };
$("guidance").oninput = guided; $("steps").oninput = leastAnew;
$("model").onchange = () => { $("typing").hidden = $("model").value !== OTHER; if ($("typing").hidden) chooseModel($("model").value); else $("typed").focus(); };
$("typed").onchange = () => $("typed").value && chooseModel($("typed").value);
$("typed").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); $("typed").blur(); } };
$("to-draw").onclick = () => turn(false); $("to-train").onclick = () => turn(true);
$("password").onchange = () => { sessionStorage.setItem("latentdiff-key", $("password").value); $("key").hidden = true; start(); };
