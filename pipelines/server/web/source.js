// A picture to start from, and its mask

const HEAD = 33; // bytes of a PNG before its other chunks
// that the mask is upright, as the browser shows its picture, whatever that one's EXIF says: a chunk eXIf, orientation 1
const UPRIGHT = new Uint8Array([0, 0, 0, 26, 101, 88, 73, 102, 77, 77, 0, 42, 0, 0, 0, 8, 0, 1, 1, 18, 0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 19, 192, 117, 231]);

async function startFrom(blob, name) {
  try { await createImageBitmap(blob); } catch { return say(name + " is not a picture that this browser reads.", true); }
  if (picture) URL.revokeObjectURL($("source").src);
  picture = { blob, name };
  $("source").src = URL.createObjectURL(blob);
  await $("source").decode();
  $("mask").width = $("source").naturalWidth; $("mask").height = $("source").naturalHeight;
  $("painting").hidden = false; $("away").hidden = false; $("file").hidden = true; $("from").textContent = "Start from a picture: " + name;
  wipe(); share(); say("");
  await fitted();
  $("start").scrollIntoView({ block: "nearest" });
}

async function fitted() { // the size at which the picture is drawn, if nobody chooses another
  const { naturalWidth: width, naturalHeight: height } = $("source");
  let size;
  try { size = await post("/page/size", { model: info.id, width, height }); } catch (error) { return say(inWords(error), true); }
  choose($("width"), size.width); choose($("height"), size.height);
  picture.size = sized();
  $("fitting").textContent = "It has " + width + "×" + height + " pixels and is drawn at " + size.width + "×" + size.height + ". Where width and height above have another shape, its edges are cut off.";
}

function remove() {
  if (picture) for (const side of ["width", "height"]) choose($(side), info[side]);
  picture = null; $("from").textContent = "Start from a picture"; $("painting").hidden = true; $("away").hidden = true; $("file").hidden = false; $("file").value = ""; wipe();
}
function wipe() { painted = false; $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height); $("strength").value = 0.8; share(); }
function share() { $("share").textContent = Math.round($("strength").value * 100) + " %"; }

function paint(event) {
  if (!event.buttons) { paint.last = null; return; }
  const canvas = $("mask"), box = canvas.getBoundingClientRect(), pen = canvas.getContext("2d");
  const x = (event.clientX - box.left) / box.width * canvas.width, y = (event.clientY - box.top) / box.height * canvas.height;
  pen.strokeStyle = squares(pen, canvas.width / 20); pen.lineCap = "round"; pen.lineWidth = $("brush").value / 100 * canvas.width;
  pen.beginPath(); pen.moveTo(...(paint.last ?? [x, y])); pen.lineTo(x, y); pen.stroke();
  paint.last = [x, y];
  if (!painted) { painted = true; $("strength").value = 1; share(); }
}

function squares(pen, side) { // seen on a picture of any colour
  const made = document.createElement("canvas"), tile = made.getContext("2d");
  made.width = made.height = 2 * Math.max(1, Math.round(side));
  for (const [i, colour] of ["white", "magenta", "magenta", "white"].entries()) {
    tile.fillStyle = colour; tile.fillRect((i % 2) * made.width / 2, Math.floor(i / 2) * made.width / 2, made.width / 2, made.width / 2);
  }
  return pen.createPattern(made, "repeat");
}

function maskBlob() { // white where painted, black elsewhere
  const made = document.createElement("canvas"), pen = made.getContext("2d");
  made.width = $("mask").width; made.height = $("mask").height;
  const pixels = $("mask").getContext("2d").getImageData(0, 0, made.width, made.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3), pixels.data[i + 3] = 255;
  pen.putImageData(pixels, 0, 0);
  return new Promise((done) => made.toBlob((blob) => done(new Blob([blob.slice(0, HEAD), UPRIGHT, blob.slice(HEAD)], { type: "image/png" })), "image/png"));
}

async function dropped(event) {
  const file = event.dataTransfer.files[0], inside = $("start").contains(event.target);
  if (!file) return;
  if (inside) return startFrom(file, file.name);
  settingsFrom(file);
}

async function settingsFrom(file) {
  const said = record(new Uint8Array(await file.arrayBuffer()));
  if (said?.prompts) return use(said);
  say(file.name + " has no settings of latentdiff in it; drop it on “Start from a picture” to draw from it.", true);
}

$("open").onclick = () => $("recorded").click();
$("recorded").onchange = () => { const file = $("recorded").files[0]; if (file) settingsFrom(file); $("recorded").value = ""; };
$("away").onclick = remove; $("wipe").onclick = wipe; $("strength").oninput = share;
$("file").onchange = () => $("file").files[0] && startFrom($("file").files[0], $("file").files[0].name);
for (const kind of ["pointerdown", "pointermove"]) $("mask").addEventListener(kind, paint);
for (const kind of ["pointerup", "pointerleave"]) $("mask").addEventListener(kind, () => { paint.last = null; });
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); dropped(event); });
