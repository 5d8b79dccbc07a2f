// Records in PNG files, and the gallery

function record(bytes) { // the text chunk "latentdiff", in Latin-1 (tEXt) or UTF-8 (iTXt, not compressed)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at), data = bytes.subarray(at + 8, at + 8 + length);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8)), end = data.indexOf(0);
    if ((kind === "tEXt" || kind === "iTXt") && new TextDecoder("latin1").decode(data.subarray(0, end)) === "latentdiff") {
      let from = end + 1;
      if (kind === "iTXt") { from = data.indexOf(0, end + 3); from = data.indexOf(0, from + 1) + 1; }
      try { return JSON.parse(new TextDecoder(kind === "tEXt" ? "latin1" : "utf-8").decode(data.subarray(from))); } catch { return null; }
    }
    at += 12 + length;
  }
  return null;
}

function bytesOf(url) { return Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (one) => one.charCodeAt(0)); }

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button"; made.textContent = text; made.onclick = action;
  return made;
}

function keep(url, note, frames, warnings = []) {
  const said = record(bytesOf(url)), one = tile(), name = said.prompts[0].replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) + "-" + said.seed + ".png";
  one.image.src = url; one.image.alt = said.prompts[0]; one.image.style.aspectRatio = said.width + "/" + said.height;
  const title = document.createElement("b"), more = document.createElement("div"), row = document.createElement("div"), link = document.createElement("a");
  title.textContent = title.title = said.prompts[0];
  more.textContent = [said.model, "seed " + said.seed, said.num_inference_steps + " steps", "guidance " + said.guidance_scale, said.width + "×" + said.height,
    said.negative_prompt && "not: " + said.negative_prompt, said.image && "from " + said.image.file,
    ...(said.loras ?? []).map((one) => one.file + " at " + (one.scale ?? 1)), note].filter(Boolean).join(", ");
  link.href = url; link.download = name; link.textContent = "download"; row.className = "row";
  row.append(link, button("use settings", () => use(said)), button("start from this", () => startFrom(new Blob([bytesOf(url)], { type: "image/png" }), name)));
  one.caption.append(title, more, ...warnings.map(warned), row);
  if (frames.length > 2) row.append(button("steps", () => strip(one.figure, frames)));
  $("gallery").prepend(one.figure);
  return one.figure;
}

function warned(text) {
  const made = document.createElement("div");
  made.className = "warning"; made.textContent = "⚠ " + text;
  return made;
}

function strip(figure, frames) { // how it came to be, shown or hidden
  const shown = figure.querySelector(".strip");
  if (shown) return shown.remove();
  const made = document.createElement("div"), count = Math.min(12, frames.length);
  made.className = "strip";
  for (let i = 0; i < count; i++) {
    const image = new Image(), number = Math.round(i * (frames.length - 1) / (count - 1));
    image.src = frames[number]; image.alt = image.title = "after step " + (number + 1);
    made.append(image);
  }
  figure.append(made);
}

function choose(select, value) { // a size that the list lacks is added
  if (![...select.options].some((one) => +one.value === value)) select.add(new Option(value, value));
  select.value = value;
}

async function use(said) {
  const notes = ["Settings taken over."];
  if (said.model !== info.id) {
    await chooseModel(said.model);
    if (said.model !== info.id) notes.push("It was drawn with the model " + said.model + ", which is not here, not with " + info.id + ".");
  }
  $("model").value = info.id; $("typing").hidden = true;
  if (!said.image) remove();
  $("prompt").value = said.prompts[0]; $("negative").value = said.negative_prompt ?? "";
  choose($("width"), said.width); choose($("height"), said.height);
  $("steps").value = said.num_inference_steps; $("guidance").value = said.guidance_scale ?? info.guidance_scale;
  guided(); leastAnew();
  $("seed").value = said.seed; $("count").value = Math.min(said.count ?? 1, info.limits.count); $("fresh").checked = false;
  if (said.strength != null) { $("strength").value = said.strength; share(); }
  const [worn, ...more] = said.loras ?? [];
  $("lora").value = worn ? worn.file : ""; $("lora-scale").value = worn?.scale ?? 1;
  if (more.length || (worn && $("lora").value !== worn.file)) notes.push("It was drawn with " + said.loras.map((one) => one.file).join(" and ") + ", which cannot be chosen here.");
  if (said.image) notes.push("It was drawn from " + said.image.file + (said.mask ? " with a mask" : "") + "; choose that as the picture too.");
  if (said.prompts.length > 1) notes.push("Of its " + said.prompts.length + " prompts this is the first.");
  if (said.seed > Number.MAX_SAFE_INTEGER) notes.push("Its seed is larger than this page can say; latentdiff replay draws it again.");
  say(notes.join(" "));
  $("prompt").scrollIntoView({ block: "nearest" });
}
