/* What points can be told apart by (class, prediction, split), how each looks, and the boxes that
   leave some of them out. Names come from files: they only ever become text. */
"use strict";

featcache.element = (tag, className, ...children) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
};

featcache.button = (className, does, ...children) => {
  const made = featcache.element("button", className, ...children);
  made.type = "button";
  made.addEventListener("click", does);
  return made;
};

featcache.drawn = (tag, attributes = {}) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

/** A name may run from right to left, and must not turn what stands beside it. */
featcache.name = (text) => featcache.element("bdi", "", text);

featcache.shapes = {
  circle: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
  square: "M-3.6 -3.6h7.2v7.2h-7.2z",
  triangle: "M0 -4.6L4.4 3.4H-4.4z",
  diamond: "M0 -4.8L3.8 0L0 4.8L-3.8 0z",
  inverted_triangle: "M0 4.6L4.4 -3.4H-4.4z",
  hex: "M4.4 0L2.2 3.8H-2.2L-4.4 0L-2.2 -3.8H2.2z",
};

{
  const COLOURS = 8;
  const FAINT = 130;

  const channels = (variable) => {
    const value = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
    return [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
  };

  /** A look's colour as RGBA in one number: a share of it is that of the text. */
  featcache.colour = ({ variable, opacity = 255, text = 0 }) => {
    const [own, other] = [channels(variable), channels("--fc-text")];
    const mixed = own.map((value, at) => Math.round(value * (1 - text) + other[at] * text));
    return [...mixed, opacity].reduce((number, value) => number * 256 + value, 0);
  };

  const classLook = (at) => {
    const markers = Object.keys(featcache.shapes);
    return {
      variable: `--fc-${1 + (at % COLOURS)}`,
      marker: markers[Math.floor(at / COLOURS) % markers.length],
      text: at < COLOURS ? 0 : 0.45, // darker on light pages, lighter on dark ones
    };
  };
  const unlabelled = { variable: "--fc-muted", marker: "circle", opacity: FAINT };

  /** One kind: a title, names, which of them each point has, and how each looks. */
  const kind = (title, names, of, looks) => {
    const counts = new Uint32Array(names.length);
    for (const value of of) counts[value] += 1;
    return { title, names, of, looks, counts, on: new Uint8Array(names.length).fill(1) };
  };

  featcache.kindsOf = (points, told) => {
    const none = told.classes.length;
    const found = {
      class: kind(
        "Class",
        [...told.classes, "no label"],
        points.label.map((label) => (label ? label - 1 : none)),
        [...told.classes.map((_, at) => classLook(at)), unlabelled],
      ),
    };
    if (points.predicted) {
      const right = (said, i) => (points.label[i] ? Number(said !== points.label[i] - 1) : 2);
      found.verdict = kind("Prediction", ["right", "wrong", "no label"], points.predicted.map(right), [
        { variable: "--fc-6", marker: "circle", opacity: FAINT },
        { variable: "--fc-2", marker: "triangle", opacity: 200, size: 1.3 },
        unlabelled,
      ]);
    }
    found.split = kind("Split", ["train", "test"], points.test, [
      { variable: "--fc-1", marker: "circle", opacity: FAINT },
      { variable: "--fc-5", marker: "square" },
    ]);
    return found;
  };
}

/** The boxes beside a map: one list for each kind, with a swatch where colours are by it. */
featcache.Boxes = class {
  constructor(list, kinds, changed) {
    this.kinds = kinds;
    this.changed = changed;
    for (const [key, kind] of Object.entries(kinds)) list.append(this.box(key, kind));
  }

  box(key, kind) {
    const { element, button } = featcache;
    const legend = element("legend", "", kind.title);
    const box = element("fieldset", `filter by-${key}`, legend);
    kind.rows = kind.names.map((text, at) => this.row(kind, text, at));
    const n = kind.rows.filter((row) => !row.hidden).length;
    if (n > 1) legend.append(" ", button("all", () => this.leave(kind, -1), "all"));
    if (n > 12) box.append(this.narrow(kind));
    box.append(element("div", "items", ...kind.rows));
    return box;
  }

  row(kind, text, at) {
    const { element, button, drawn } = featcache;
    const input = element("input");
    input.type = "checkbox";
    input.checked = true;
    input.addEventListener("change", () => {
      kind.on[at] = Number(input.checked);
      this.changed();
    });
    const swatch = drawn("svg", { viewBox: "-6 -6 12 12", "aria-hidden": "true", class: "swatch" });
    swatch.append(drawn("path"));
    const count = element("span", "count", kind.counts[at].toLocaleString("en"));
    const only = button("only", () => this.leave(kind, at), "only");
    only.setAttribute("aria-label", `show ${text} only`);
    const label = element("label", "item", input, swatch, featcache.name(text), count);
    const row = element("div", "row", label, only);
    row.hidden = !kind.counts[at];
    Object.assign(row, { swatch, input });
    return row;
  }

  /** A field that leaves the classes with such a name in the list. */
  narrow(kind) {
    const search = featcache.element("input", "narrow");
    search.type = "search";
    search.placeholder = "find a class";
    search.setAttribute("aria-label", "find a class");
    search.addEventListener("input", () => {
      const wanted = search.value.toLowerCase();
      kind.rows.forEach((row, at) => {
        row.hidden = !kind.counts[at] || !kind.names[at].toLowerCase().includes(wanted);
      });
    });
    return search;
  }

  /** Leave one of a kind, or with -1 all of it. */
  leave(kind, wanted) {
    kind.rows.forEach((row, at) => {
      kind.on[at] = Number(wanted < 0 || at === wanted);
      row.input.checked = Boolean(kind.on[at]);
    });
    this.changed();
  }

  /** Show a swatch beside everything of the kind that colours go by. */
  paint(mode) {
    for (const [key, kind] of Object.entries(this.kinds)) {
      kind.rows.forEach(({ swatch }, at) => {
        swatch.toggleAttribute("hidden", key !== mode);
        const { variable, marker, text = 0 } = kind.looks[at];
        swatch.firstChild.setAttribute("d", featcache.shapes[marker]);
        const mixed = `var(--fc-text) ${100 * text}%, var(${variable})`;
        swatch.firstChild.style.fill = `color-mix(in srgb, ${mixed})`;
      });
    }
  }
};
