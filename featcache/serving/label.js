// The page of labelling: an image comes, a key answers, the head learns from it.
const KEYS = "123456789abcdefghijklmnopqrstuvwxy"; // z takes back
const SVG = "http://www.w3.org/2000/svg", MATCHES = 12;
const POLL_MS = 700, IDLE_MS = 4000;
const browser = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
const versions = new Map(), answered = []; // what this page knows, and what it can take back
let item = null, state = null, waiting = false, drawn = "";

const trouble = (text) => {
  at("trouble").textContent = text;
  shown("trouble", Boolean(text));
};

const ask = async (what, given) => {
  const address = `/label/${what}?browser=${browser}`;
  const options = given === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(given),
  };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer; what was saved before is safe. Try again.");
  }
  const answer = await response.json();
  for (const one of [answer.item, answer.next]) if (one) versions.set(one.id, one.version);
  if (answer.state) take(answer.state);
  if (!response.ok && response.status !== 409) throw new Error(answer.error);
  return { ...answer, stale: response.status === 409 };
};

// One thing at a time: keys that come too early are left out, and none answers for the next image.
const once = (action) => async (...given) => {
  if (waiting) return;
  waiting = true;
  try {
    trouble("");
    await action(...given);
  } catch (error) {
    trouble(error.message);
  } finally {
    waiting = false;
  }
};

const after = (answer, coming) => {
  if (answer.stale) trouble("Somebody else has answered this one since: here it is as it is now.");
  show(answer.stale ? answer.item : coming);
};
const correct = once(async (label) => {
  if (!item || label === undefined || label === null) return;
  const { id } = item;
  const answer = await ask("correct", { id, label, version: versions.get(id) });
  if (!answer.stale) answered.push(id);
  after(answer, answer.next);
});
const skip = once(async () => {
  if (item) show((await ask("skip", { id: item.id })).item);
});
const undo = once(async () => {
  const id = answered.pop();
  if (id === undefined) return;
  const answer = await ask("undo", { id, version: versions.get(id) });
  after(answer, answer.item);
});
const next = once(async () => show((await ask("next")).item));

const WHY = {
  suspect: "The head and the nearest images doubt this label.",
  unlabelled: "This image has no label yet.",
  uncertain: "The head is least sure of this one.",
};

const choice = (name, key) => {
  const likely = new Map(item.likely), button = made("button");
  button.type = "button";
  button.append(made("kbd", key), made("bdi", name));
  if (likely.has(name)) {
    const fill = made("span", undefined, "fill");
    fill.style.width = `${100 * likely.get(name)}%`;
    button.append(made("small", percent(likely.get(name))), fill);
  }
  button.classList.toggle("present", name === item.label);
  button.classList.toggle("suggested", name === item.suggested);
  button.addEventListener("click", () => correct(name));
  const line = made("li");
  line.append(button);
  return line;
};
const isMany = () => state.classes.length > KEYS.length;
const keyed = () => (isMany() ? item.likely.map(([name]) => name) : state.classes);
const matches = () => {
  const wanted = at("filter").value.trim().toLowerCase();
  if (!item || !wanted) return [];
  return state.classes.filter((name) => name.toLowerCase().includes(wanted)).slice(0, MATCHES);
};

const show = (coming) => {
  item = coming;
  for (const id of ["accept", "pass"]) at(id).disabled = !item;
  at("undo").disabled = !answered.length;
  at("picture").hidden = !item;
  at("filter").value = "";
  at("matches").replaceChildren();
  if (!item) {
    at("classes").replaceChildren();
    for (const id of ["label", "suggested"]) at(id).textContent = "–";
    at("name").textContent = "";
    const isReady = state && state.ready;
    at("question").textContent = isReady ? "Nothing left to look at." : "Looking through the images …";
    at("why").textContent = isReady ? "Skipped images come back when the server starts again." : "The head learns what it can from the labels that there are.";
    return;
  }
  at("picture").src = item.image;
  at("question").replaceChildren("Is this ", made("bdi", item.suggested ?? item.label ?? "…"), "?");
  at("why").textContent = WHY[item.why] ?? "As it is now.";
  at("label").replaceChildren(item.label === null ? "none" : made("bdi", item.label));
  const sure = item.probability === null ? "" : ` ${percent(item.probability)}`;
  at("suggested").replaceChildren(made("bdi", item.suggested ?? "–"), made("small", sure, "muted"));
  at("name").replaceChildren(made("bdi", item.id));
  at("more").hidden = at("find-key").hidden = !isMany();
  at("classes").replaceChildren(...keyed().map((name, number) => choice(name, KEYS[number])));
  at("item").focus({ preventScroll: true });
};

const take = (now) => {
  state = now;
  const last = state.curve.at(-1), first = state.curve[0];
  at("reviewed").textContent = count(state.n_reviewed);
  at("changed").textContent = count(state.n_changed);
  at("left").textContent = state.ready ? count(state.n_left) : "–";
  document.body.classList.toggle("training", state.training);
  at("busy").textContent = state.problem ?? (state.training ? "learning from the latest answers …" : "The head knows every answer.");
  if (last) {
    at("accuracy").textContent = percent(last.accuracy);
    const gained = 100 * (last.accuracy - first.accuracy);
    const moved = state.curve.length > 1 ? `${gained < 0 ? "−" : "+"}${Math.abs(gained).toFixed(1)} points · ` : "";
    at("interval").textContent = `${moved}${percent(last.low)} to ${percent(last.high)}`;
    const where = state.holdout === "val" ? "on the images of val" : "in cross-validation, by the labels as they are now";
    at("measured").textContent = `accuracy ${where} (${count(state.n_holdout)} images)`;
  }
  draw();
};

const draw = () => {
  const box = at("curve"), points = state.curve, key = JSON.stringify([points, box.clientWidth]);
  if (!points.length || key === drawn) return;
  drawn = key;
  const wide = box.clientWidth, high = box.clientHeight, left = 52, right = 14, top = 8, foot = 22;
  let low = Math.min(...points.map((one) => one.low)), most = Math.max(...points.map((one) => one.high));
  if (most - low < 0.01) [low, most] = [low - 0.005, most + 0.005];
  const start = points[0].n_corrected, end = Math.max(points.at(-1).n_corrected, start + 10);
  const x = (n) => left + (n - start) / (end - start) * (wide - left - right);
  const y = (share) => top + (most - share) / (most - low) * (high - top - foot);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Accuracy from ${percent(points[0].accuracy)} to ${percent(points.at(-1).accuracy)}`);
  const add = (tag, facts, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(facts)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
  };
  for (const share of [low, (low + most) / 2, most]) {
    add("line", { class: "grid", x1: left, x2: wide - right, y1: y(share), y2: y(share) });
    add("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, percent(share));
  }
  add("text", { x: left, y: high - 4 }, `${count(start)} looked at`);
  add("text", { x: wide - right, y: high - 4, "text-anchor": "end" }, count(end));
  const path = (name) => points.map((one) => `${x(one.n_corrected).toFixed(1)},${y(one[name]).toFixed(1)}`);
  add("polygon", { class: "band", points: [...path("high"), ...path("low").reverse()].join(" ") });
  add("polyline", { class: "line", points: path("accuracy").join(" ") });
  const last = points.at(-1);
  add("circle", { class: "dot", r: 5, cx: x(last.n_corrected), cy: y(last.accuracy) });
  box.replaceChildren(svg);
};

const follow = async () => {
  try {
    const response = await fetch("/label/state");
    if (response.ok) take(await response.json());
    if (!item && state.ready) await next();
  } catch { /* the next action says that the server is gone */ }
  setTimeout(follow, !state || state.training ? POLL_MS : IDLE_MS);
};

at("accept").addEventListener("click", () => correct(item && item.suggested));
at("pass").addEventListener("click", skip);
at("undo").addEventListener("click", undo);
at("filter").addEventListener("input", () => {
  at("matches").replaceChildren(...matches().map((name) => choice(name, "")));
});
at("filter").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && matches().length) correct(matches()[0]);
  if (event.key === "Escape") at("item").focus({ preventScroll: true });
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target === at("filter")) return;
  const isControl = event.target.closest("button, a") !== null;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "z") undo();
  else if (key === "/" && !at("more").hidden) at("filter").focus();
  else if (isControl && (key === "Enter" || key === " ")) return; // it presses that button
  else if (key === "Enter") correct(item && item.suggested);
  else if (key === " ") skip();
  else if (item && KEYS.includes(key) && key.length === 1) correct(keyed()[KEYS.indexOf(key)]);
  else return;
  event.preventDefault();
});
addEventListener("resize", () => state && draw());
follow();
