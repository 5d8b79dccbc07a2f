// A picture to start from, and its mask

async function startFrom(blob, name) {
  try { await createImageBitmap(blob); } catch { return say(name + " is not a picture that this browser reads.", true); }
  if (picture) URL.revokeObjectURL($("source").src);
  picture = { blob, name };
  $("source").src = URL.createObjectURL(blob);
  await $("source").decode();
  $("mask").width = $("source").naturalWidth; $("mask").height = $("source").naturalHeight;
  $("painting").hidden = false; $("away").hidden = false;
  wipe(); share(); say("");
}

function remove() { picture = null; $("painting").hidden = true; $("away").hidden = true; $("file").value = ""; wipe(); }
function wipe() { painted = false; $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height); $("strength").value = 0.8; share(); }
function share() { $("share").textContent = Math.round($("strength").value * 100) + " %"; }

function paint(event) {
  if (!event.buttons) { paint.last = null; return; }
  const canvas = $("mask"), box = canvas.getBoundingClientRect(), pen = canvas.getContext("2d");
  const x = (event.clientX - box.left) / box.width * canvas.width, y = (event.clientY - box.top) / box.height * canvas.height;
  pen.strokeStyle = "red"; pen.lineCap = "round"; pen.lineWidth = $("brush").value / 100 * canvas.width;
  pen.beginPath(); pen.moveTo(...(paint.last ?? [x, y])); pen.lineTo(x, y); pen.stroke();
  paint.last = [x, y];
  if (!painted) { painted = true; $("strength").value = 1; share(); }
}

function maskBlob() { // white where painted, black elsewhere
  const made = document.createElement("canvas"), pen = made.getContext("2d");
  made.width = $("mask").width; made.height = $("mask").height;
  const pixels = $("mask").getContext("2d").getImageData(0, 0, made.width, made.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3), pixels.data[i + 3] = 255;
  pen.putImageData(pixels, 0, 0);
  return new Promise((done) => made.toBlob(done, "image/png"));
}

async function dropped(event) {
  const file = event.dataTransfer.files[0], inside = $("start").contains(event.target);
  if (!file) return;
  const said = record(new Uint8Array(await file.arrayBuffer()));
  if (inside) return startFrom(file, file.name);
  if (said?.prompts) return use(said);
  say(file.name + " has no settings of latentdiff in it; drop it on “Start from a picture” to draw from it.", true);
}

$("away").onclick = remove; $("wipe").onclick = wipe; $("strength").oninput = share;
$("file").onchange = () => $("file").files[0] && startFrom($("file").files[0], $("file").files[0].name);
for (const kind of ["pointerdown", "pointermove"]) $("mask").addEventListener(kind, paint);
for (const kind of ["pointerup", "pointerleave"]) $("mask").addEventListener(kind, () => { paint.last = null; });
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); dropped(event); });
