// Training: in a process of the server's; this page shows what it has written down

const POLL = 1500;
const CURVES = { loss: ["training loss", "#2f6fdb"], val_loss: ["held-out loss", "#d9822b"] };
const FIELDS = { data: "data", model: "base", method: "method", output: "output", caption: "caption",
  max_steps: "max-steps", batch_size: "batch", sample_every: "every", learning_rate: "rate" };
let trained = null, seen = {}, watching = false;

async function watch() { // until nothing runs any more
  if (watching) return;
  watching = true;
  try {
    for (;;) {
      show(await (await ask("/page/training")).json());
      if (!trained.running) break;
      await new Promise((go) => setTimeout(go, POLL));
    }
  } catch (error) { tell(inWords(error), true); }
  watching = false;
}

async function command(name, values) {
  try {
    show(await post("/page/training/" + name, values));
    watch();
  } catch (error) { tell(inWords(error), true); }
}

function asked() {
  const values = {};
  for (const [name, id] of Object.entries(FIELDS)) {
    const field = $(id), value = field.value.trim();
    if (value) values[name] = field.type === "number" ? +value : value;
  }
  return values;
}

function tell(text, error = false) { $("told").textContent = text; $("told").className = error ? "error" : ""; }

function show(state) {
  const before = trained;
  trained = state;
  $("to-train").textContent = state.running ? "Train ●" : "Train";
  $("end").disabled = !state.running;
  for (const id of ["look", "begin"]) $(id).disabled = state.running || !offer?.folders.length;
  if (!state.kind) return;
  if (!before && !$("data").value) { // the page was opened anew
    const values = state.asked ?? { data: state.data };
    for (const [name, id] of Object.entries(FIELDS)) if (name !== "model" || values.model) $(id).value = values[name] ?? "";
  }
  const what = state.kind === "look" ? "Looking at " + state.data : "Training " + state.output + " on " + state.data;
  const ends = { finished: "Finished.", stopped: "Stopped; the same folder for the result goes on from there.", failed: "It failed; below it says why." };
  tell(state.stopping ? "Stopping: what was trained is saved, which may take a minute ..." : state.running ? what + " ..." : state.kind === "look" ? what + ": done." : what + ". " + ends[state.ended], state.ended === "failed" && state.kind !== "look");
  $("log").textContent = state.said.trim() || "It begins ...";
  $("log").scrollTop = state.kind === "look" ? 0 : $("log").scrollHeight;
  plot(state.curves);
  $("done").hidden = !state.draws;
  if (before?.running && !state.running && state.kind === "finetune") offered().catch(() => {});
  samples(state);
}

async function samples(state) {
  const of = (state.output ?? "look") + "/";
  if (!Object.keys(seen).every((one) => one.startsWith(of))) { seen = {}; $("samples").replaceChildren(); }
  $("samples-title").hidden = !state.samples.length;
  $("samples-title").textContent = state.output ? "Samples" : "Through the autoencoder";
  for (const name of state.samples.slice(-24)) {
    if (of + name in seen && state.output) continue;
    const old = seen[of + name], figure = seen[of + name] = document.createElement("figure");
    const image = new Image(), caption = document.createElement("figcaption"), step = name.match(/^step-(\d+)/);
    caption.textContent = image.alt = step ? "step " + (+step[1]) : "originals, what the model's autoencoder keeps of them, and what it loses";
    figure.append(image, caption);
    figure.title = "larger, or as before"; figure.onclick = () => figure.classList.toggle("large");
    if (old) old.replaceWith(figure); else $("samples").prepend(figure);
    try { image.src = URL.createObjectURL(await (await ask("/page/training/samples/" + name)).blob()); } catch { figure.remove(); delete seen[of + name]; }
  }
}

function drawn(name, attributes, text) {
  const made = document.createElementNS($("plot").namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text != null) made.textContent = text;
  return made;
}

function plot(curves) {
  const svg = $("plot"), [width, left, bottom, top] = [Math.min(760, svg.parentElement.clientWidth - 32), 64, 250, 26];
  svg.setAttribute("viewBox", "0 0 " + width + " 280"); // a unit is a pixel: letters keep their size
  svg.replaceChildren(); svg.style.display = Object.keys(curves).length ? "block" : "none";
  if (!Object.keys(curves).length || width <= 0) return; // nothing to show, or not seen yet
  const points = Object.values(curves).flat(), steps = points.map((one) => one[0]), values = points.map((one) => one[1]);
  const [first, last] = [Math.min(...steps), Math.max(...steps)], [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (step) => left + (width - left - 12) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => bottom - (bottom - top) * (high > low ? (value - low) / (high - low) : 0.5);
  for (const share of [0, 0.5, 1]) {
    const value = low + (high - low) * share, step = Math.round(first + (last - first) * share);
    svg.append(drawn("line", { x1: left, x2: width - 12, y1: y(value), y2: y(value), stroke: "currentColor", opacity: 0.15 }));
    svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(3)));
    svg.append(drawn("text", { x: x(step), y: bottom + 18, "text-anchor": share === 1 ? "end" : share ? "middle" : "start" }, (share === 1 ? "step " : "") + step));
  }
  let at = left;
  for (const [name, [title, colour]] of Object.entries(CURVES)) {
    if (!curves[name]) continue;
    svg.append(drawn("path", { "data-curve": name, stroke: colour, d: curves[name].map(([step, value], i) => (i ? "L" : "M") + x(step).toFixed(1) + " " + y(value).toFixed(1)).join("") }));
    for (const [step, value] of curves[name].length <= 40 ? curves[name] : []) svg.append(drawn("circle", { cx: x(step), cy: y(value), r: 3, fill: colour }));
    svg.append(drawn("rect", { x: at, y: 6, width: 14, height: 4, fill: colour }), drawn("text", { x: at + 20, y: 12 }, title));
    at += 140;
  }
}

onresize = () => trained?.curves && plot(trained.curves);

$("train").onsubmit = (event) => {
  event.preventDefault();
  if (!$("output").value.trim()) { $("output").focus(); return tell("Say in which folder the result is to be.", true); }
  command("start", asked());
};
$("look").onclick = () => $("data").reportValidity() && command("look", { data: $("data").value, model: $("base").value });
$("end").onclick = () => command("stop", {});
$("try").onclick = async () => { const name = trained.output; turn(false); await offered(); await chooseModel(name); };
