// The page of featcache serve: an image goes out, an answer comes back and is drawn.
const NEAREST = 12, BARS = 10, JPEG = 0.92;
let model = null, asked = 0, stream = null, address = null;

const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });

const describe = async () => {
  model = await (await fetch("/model")).json();
  let said = `${model.backbone}, ${count(model.classes.length)} ${model.task}`;
  const { accuracy, learnt } = model;
  if (accuracy) {
    const [low, high] = accuracy.top1_interval;
    said += `: top-1 ${percent(accuracy.top1)} (${percent(low)} to ${percent(high)}) on ${count(accuracy.n_test)} test images`;
  } else if (learnt) {
    said += ", learnt from your corrections";
    if (learnt.n_corrected) {
      const where = learnt.holdout === "val" ? "on the images of val" : "in cross-validation";
      said += `, ${count(learnt.n_corrected)} so far: top-1 ${percent(learnt.accuracy)} (${percent(learnt.low)} to ${percent(learnt.high)}) ${where}`;
    }
  }
  at("about").textContent = `${said}.`;
  shown("to-label", model.labelling);
};

const trouble = (text) => {
  at("trouble").textContent = text;
  shown("trouble", true);
  shown("found", false);
  shown("near", false);
  shown("empty", false);
};

const show = (blob) => {
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(blob);
  const picture = at("picture");
  picture.classList.remove("tiny");
  picture.onload = () => picture.classList.toggle("tiny", picture.naturalWidth <= 96);
  picture.onerror = () => { shown("picture", false); shown("invite", true); };
  picture.src = address;
  shown("picture", true);
  shown("invite", false);
};

const ask = async (blob, name) => {
  const mine = ++asked;
  closeCamera();
  show(blob);
  if (model === null) await describe();
  else if (model.labelling) describe(); // the head that answers may be another by now
  if (blob.size > model.max_bytes) {
    trouble(`The image has ${(blob.size / 1e6).toFixed(1)} MB; this server takes up to ${(model.max_bytes / 1e6).toFixed(0)} MB.`);
    return;
  }
  shown("busy", true);
  const near = model.neighbours ? NEAREST : 0;
  const began = performance.now();
  let answer, facts;
  try {
    answer = await fetch(`/predict?top=${BARS}&neighbours=${near}`, {
      method: "POST", body: blob, headers: { "content-type": "application/octet-stream" },
    });
    facts = await answer.json();
  } catch {
    if (mine === asked) trouble("The server does not answer; is it still running?");
    return;
  } finally {
    if (mine === asked) shown("busy", false);
  }
  if (mine !== asked) return; // another image was given meanwhile
  if (!answer.ok) {
    const wait = answer.headers.get("retry-after");
    trouble(facts.error + (wait ? ` in ${wait} s.` : ""));
    return;
  }
  draw(facts[0], name, performance.now() - began, answer.headers.get("server-timing") || "");
};

const draw = (row, name, took, timing) => {
  shown("trouble", false);
  shown("empty", false);
  shown("found", true);
  at("said-of").textContent = name;
  const values = row.values, pairs = values || row.top;
  const present = row.labels && new Set(row.labels.map(([label]) => label));
  const headline = at("headline");
  headline.replaceChildren();
  if (values) headline.append(`${values.length} ${values.length === 1 ? "number" : "numbers"}`);
  else if (present) headline.append(present.size ? [...present].join(", ") : "No label reaches its threshold");
  else headline.append(named(row.class_name), made("small", percent(row.probability), "muted"));
  const most = values ? Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-12) : 1;
  at("bars").replaceChildren(...pairs.map(([label, value], rank) => {
    const item = made("li"), track = made("span", "", "track"), fill = made("span", "", "fill");
    fill.style.width = `${(100 * Math.abs(value)) / most}%`;
    track.append(fill);
    track.setAttribute("aria-hidden", "true");
    if (present ? present.has(label) : rank === 0 && !values) item.className = "first";
    item.append(named(label), track, made("span", values ? number(value) : percent(value), "n"));
    return item;
  }));
  const parts = [...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, what, ms]) => `${what} ${Math.round(ms)}`);
  at("latency").textContent = `${Math.round(took)} ms${parts.length ? ` (${parts.join(", ")})` : ""}`;
  const near = row.neighbours || [];
  shown("near", near.length > 0);
  at("nearest").replaceChildren(...near.map((one) => {
    const item = made("li");
    if (one.picture) {
      const picture = made("img");
      picture.alt = "";
      picture.loading = "lazy";
      picture.width = picture.height = 128;
      picture.src = one.picture;
      item.append(picture);
    }
    const label = one.label === null ? made("span", "no label", "muted") : named(one.label);
    label.classList.add("class");
    if (one.label !== null && row.class_name !== null && !present && one.label !== row.class_name) item.className = "other";
    item.append(label, made("p", `${one.similarity.toFixed(3)} · ${one.split}`));
    return item;
  }));
};

const take = (files, name) => {
  if (files.length) ask(files[0], files[0].name || name); // the server knows more types than we do
  else trouble("That is no image file.");
};

const openCamera = async () => {
  if (!navigator.mediaDevices) {
    trouble("The browser gives no camera to this page: it needs https, or an address on this machine.");
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    trouble(`No camera: ${error.message}`);
    return;
  }
  at("camera").srcObject = stream;
  for (const id of ["camera", "shoot", "close-camera"]) shown(id, true);
  for (const id of ["picture", "invite", "open-camera"]) shown(id, false);
  at("shoot").focus();
};
const closeCamera = () => {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = null;
  at("camera").srcObject = null;
  for (const id of ["camera", "shoot", "close-camera"]) shown(id, false);
  shown("open-camera", true);
  shown("picture", address !== null);
  shown("invite", address === null);
};
const shoot = () => {
  const video = at("camera"), canvas = document.createElement("canvas");
  if (!stream || !video.videoWidth) return;
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => ask(blob, "camera"), "image/jpeg", JPEG);
};

at("file").addEventListener("change", (event) => {
  if (event.target.files.length) take(event.target.files, "file");
  event.target.value = "";
});
at("open-camera").addEventListener("click", openCamera);
at("close-camera").addEventListener("click", closeCamera);
at("shoot").addEventListener("click", shoot);
let inside = 0;
const dragged = (event, change) => {
  event.preventDefault();
  inside = Math.max(0, inside + change);
  document.body.classList.toggle("dragging", inside > 0);
};
addEventListener("dragenter", (event) => dragged(event, 1));
addEventListener("dragleave", (event) => dragged(event, -1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  inside = 0;
  dragged(event, 0);
  take(event.dataTransfer.files, "dropped image");
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) take(files, "pasted image");
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not(.file)")) return;
  const key = event.key.toLowerCase();
  if (key === "o") at("file").click();
  else if (key === "c" && !stream) openCamera();
  else if (key === "escape") closeCamera();
  else if (key === " " && stream && event.target.id !== "shoot") { event.preventDefault(); shoot(); }
});
describe().catch(() => trouble("The server does not answer; is it still running?"));
