/* The map of features. Bokeh draws, drags and zooms; this says which points are drawn and how, and
   what stands in the tip and in the panel of the chosen image. Names come from files: they only
   ever become text. */
"use strict";

const featcache = {};

{
  const WHOLE = 1.04; // of the map's side, with a margin
  const REACH_PX = 9;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };
  const button = (className, does, ...children) => {
    const made = element("button", className, ...children);
    made.type = "button";
    made.addEventListener("click", does);
    return made;
  };
  /** A name may run from right to left, and must not turn what stands beside it. */
  const name = (text) => element("bdi", "", text);
  const shown = (number) => number.toLocaleString("en");

  /** Unpack the JSON that `map.encode` compressed. */
  const decode = async (text) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };

  /** Whether hardware draws WebGL: software that pretends to is slower than Bokeh's canvas. */
  const graphicsCard = () => {
    const gl = document.createElement("canvas").getContext("webgl", { failIfMajorPerformanceCaveat: true });
    const known = gl?.getExtension("WEBGL_debug_renderer_info");
    const renderer = gl?.getParameter(known ? known.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
    return Boolean(gl) && !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(String(renderer));
  };

  class FeatureMap {
    constructor(root, told) {
      Object.assign(this, told, { root, chosen: -1, tipped: -1 });
      this.n = this.ids.length;
      this.find = (selector) => root.querySelector(selector);
      this.all = (selector) => Array.from(root.querySelectorAll(selector));
      this.stage = this.find(".stage");
      this.dark = matchMedia("(prefers-color-scheme: dark)");
      // By strides of a prime, so that no class lies on top of the others.
      this.order = Array.from({ length: this.n }, (_, i) => (i * 2654435761) % this.n);
    }

    async start() {
      Bokeh.set_log_level("warn");
      if (!graphicsCard()) this.plot.doc.roots[0].attributes.output_backend = "canvas";
      const views = await Bokeh.embed.embed_item(this.plot, this.find(".plot"));
      const { model, canvas_view: { events_el: events } } = Array.from(views)[0];
      events.tabIndex = -1; // the stage around it has the keys
      events.style.touchAction = "pan-y"; // a finger that goes up or down scrolls the page
      this.figure = model;
      for (const key of ["dots", "rings", "lines"]) this[key] = model.document.get_model_by_name(key);
      const wheel = model.toolbar.tools.find((tool) => tool.type === "WheelZoomTool");
      for (const range of [model.x_range, model.y_range]) range.change.connect(() => this.moved());
      this.listen(wheel);
      this.listenToSearch();
      this.update();
      this.root.classList.add("ready");
    }

    // ---- what is drawn

    update() {
      const mode = this.find("input[type=radio]:checked").value;
      const { of, looks } = this.kinds[mode];
      const kinds = Object.entries(this.kinds).map(([key, kind]) => {
        for (const swatch of this.all(`.by-${key} .swatch`)) swatch.hidden = key !== mode;
        return { of: kind.of, on: this.all(`.by-${key} [type=checkbox]`).map((box) => box.checked) };
      });
      this.drawn = this.order.filter((i) => kinds.every((kind) => kind.on[kind.of[i]]));
      if (mode !== "class") this.drawn.sort((a, b) => of[a] - of[b]); // mistakes, or test, on top
      const scheme = Number(this.dark.matches);
      const colours = looks.map((look) => parseInt(look.colours[scheme].slice(1), 16) * 256 + look.opacity);
      this.dots.data_source.data = {
        x: this.drawn.map((i) => this.x[i]),
        y: this.drawn.map((i) => this.y[i]),
        c: Uint32Array.from(this.drawn, (i) => colours[of[i]]),
        m: this.drawn.map((i) => looks[of[i]].marker),
      };
      const text = getComputedStyle(document.documentElement).getPropertyValue("--fc-text").trim();
      for (const { glyph } of [this.rings, this.lines]) glyph.line_color = { value: text };
      const some = this.drawn.length < this.n ? `${shown(this.drawn.length)} of ` : "";
      this.find(".shown").textContent = `${some}${shown(this.n)} images`;
      this.resize();
    }

    /** Points grow as one zooms in, so that their shapes can be seen. */
    resize() {
      const plain = Math.max(3.5, Math.min(9, 3 + 140 / Math.sqrt(this.drawn.length + 1)));
      this.dots.glyph.size = { value: Math.min(12, plain * Math.max(1, WHOLE / this.view[2]) ** 0.45) };
    }

    /** Rings around the chosen point and its neighbours, and lines between them. */
    mark() {
      const i = this.chosen;
      const near = this.neighbours[i] || [];
      const all = i < 0 ? [] : [i, ...near];
      const places = (values, points) => points.map((point) => values[point]);
      this.rings.data_source.data = {
        x: places(this.x, all), y: places(this.y, all), s: all.map((_, at) => (at ? 11 : 17)),
      };
      this.lines.data_source.data = {
        x0: near.map(() => this.x[i]), y0: near.map(() => this.y[i]),
        x1: places(this.x, near), y1: places(this.y, near),
      };
    }

    // ---- what part of the map is seen

    /** The middle and the side of the square that is seen, from 0 to 1. */
    get view() {
      const { x_range: across, y_range: up } = this.figure;
      return [(across.start + across.end) / 2, (up.start + up.end) / 2, across.end - across.start];
    }

    set view([x, y, side]) {
      const half = Math.max(0.004, Math.min(1.5, side)) / 2;
      this.figure.x_range.setv({ start: x - half, end: x + half });
      this.figure.y_range.setv({ start: y - half, end: y + half });
    }

    zoom(factor) {
      const [x, y, side] = this.view;
      this.view = factor ? [x, y, side / factor] : [0.5, 0.5, WHOLE];
    }

    move(right, up) {
      const [x, y, side] = this.view;
      this.view = [x + right * side, y + up * side, side];
    }

    moved() {
      this.hideTip();
      clearTimeout(this.resting);
      this.resting = setTimeout(() => this.resize(), 200);
    }

    /** Where a point is on the stage, in pixels. */
    place(i) {
      const [x, y, side] = this.view;
      const { width, height } = this.stage.getBoundingClientRect();
      return [((this.x[i] - x) / side + 0.5) * width, (0.5 - (this.y[i] - y) / side) * height];
    }

    /** The nearest of the drawn points within reach of the pointer; -1 where there is none. */
    under(event) {
      const [x, y, side] = this.view;
      const box = this.stage.getBoundingClientRect();
      const right = x + ((event.clientX - box.left) / box.width - 0.5) * side;
      const up = y + (0.5 - (event.clientY - box.top) / box.height) * side;
      let [best, least] = [-1, ((REACH_PX / box.width) * side) ** 2];
      for (const i of this.drawn) {
        const distance = (this.x[i] - right) ** 2 + (this.y[i] - up) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
      return best;
    }

    // ---- one image, in words

    label(i) {
      return name(this.kinds.class.names[this.kinds.class.of[i]]);
    }

    thumb(i) {
      if (!this.thumbs.length) return [];
      const image = Object.assign(element("img", "thumb"), { alt: "" });
      if (this.thumbs[i]) image.src = `data:image/webp;base64,${this.thumbs[i]}`;
      return [image];
    }

    /** The thumbnail, where there are any, and lines: class, prediction, split, id. */
    words(i) {
      const { predicted, confidence, kinds } = this;
      const lines = [element("p", "class", this.label(i))];
      if (predicted) {
        const share = confidence ? `, ${confidence[i] || "under\u00a01"}\u00a0%` : "";
        const verdict = [["right", " ✓ correct"], ["wrong", " ✗ wrong"], ["", ""]][kinds.verdict.of[i]];
        const said = name(kinds.class.names[predicted[i]]);
        lines.push(element("p", "said", "predicted ", said, share, element("span", ...verdict)));
      }
      lines.push(element("p", "split", kinds.split.of[i] ? "test image" : "training image"));
      lines.push(element("p", "id", name(this.ids[i])));
      return [...this.thumb(i), element("div", "", ...lines)];
    }

    showTip(i) {
      if (i === this.tipped) return;
      this.tipped = i;
      const [tip, ring] = [this.find(".tip"), this.find(".ring")];
      tip.replaceChildren(...this.words(i));
      tip.hidden = ring.hidden = false;
      const [x, y] = this.place(i);
      const { width, height } = this.stage.getBoundingClientRect();
      ring.style.transform = `translate(${x}px, ${y}px)`;
      const left = Math.max(4, Math.min(x + 14, width - tip.offsetWidth - 4));
      const top = y + 14 + tip.offsetHeight < height ? y + 14 : Math.max(4, y - 14 - tip.offsetHeight);
      tip.style.transform = `translate(${left}px, ${top}px)`;
      this.stage.classList.add("over");
    }

    hideTip() {
      this.tipped = -1;
      this.find(".tip").hidden = this.find(".ring").hidden = true;
      this.stage.classList.remove("over");
    }

    /** Choose an image and list its neighbours, each a button that chooses it; -1 chooses none. */
    choose(i) {
      this.chosen = i;
      this.mark();
      const panel = this.find(".chosen");
      if (i < 0) {
        delete panel.dataset.point;
        panel.replaceChildren(element("p", "hint", panel.dataset.hint));
        return;
      }
      panel.dataset.point = i;
      const near = this.neighbours[i];
      const { of } = this.kinds.class;
      const buttons = near.map((other) => {
        const last = element("span", "id", name(this.ids[other].split("/").pop()));
        const children = [...this.thumb(other), element("span", "class", this.label(other)), last];
        const made = button(of[other] === of[i] ? "" : "other", () => this.goTo(other), ...children);
        made.dataset.point = other;
        made.title = this.ids[other];
        return element("li", "", made);
      });
      const title = element(`h${this.root.dataset.level}`, "title", "Selected image");
      title.tabIndex = -1;
      const same = near.filter((other) => of[other] === of[i]).length;
      panel.replaceChildren(
        element("div", "head", title, button("close", () => this.choose(-1), "Clear")),
        element("div", "one", ...this.words(i)),
        element("p", "lead", `The ${near.length} nearest neighbours in feature space, ${same} of them of the same class:`),
        element("ol", this.thumbs.length ? "near" : "near plain", ...buttons),
      );
    }

    /** Choose a point that was not clicked: bring it into view, and go on reading there. */
    goTo(i) {
      this.choose(i);
      const [x, y, side] = this.view;
      const away = Math.max(Math.abs(this.x[i] - x), Math.abs(this.y[i] - y));
      if (away > 0.46 * side) this.view = [this.x[i], this.y[i], side];
      this.find(".chosen .title").focus();
    }

    // ---- listening

    listen(wheel) {
      const { stage } = this;
      let pressed = [0, 0];
      const on = (kind, does) => stage.addEventListener(kind, does, true);
      on("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
      on("pointermove", (event) => {
        const i = event.pointerType === "touch" || event.buttons ? -1 : this.under(event);
        if (i < 0) this.hideTip();
        else this.showTip(i);
      });
      stage.addEventListener("pointerleave", () => this.hideTip());
      on("click", (event) => {
        if (Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4) return; // a drag
        stage.focus({ preventScroll: true });
        const i = this.under(event);
        if (i >= 0) this.choose(i);
      });
      // The wheel scrolls the page until the map has been clicked; two fingers always zoom it.
      const coarse = matchMedia("(pointer: coarse)").matches;
      wheel.active = coarse;
      stage.addEventListener("focusin", () => { wheel.active = true; });
      stage.addEventListener("focusout", () => { wheel.active = coarse; });
      for (const one of this.all("[data-zoom]")) {
        one.addEventListener("click", () => this.zoom(Number(one.dataset.zoom)));
      }
      for (const input of [...this.all("[type=radio], [type=checkbox]"), this.dark]) {
        input.addEventListener("change", () => this.update());
      }
      for (const only of this.all("[data-only]")) {
        only.addEventListener("click", () => {
          const wanted = Number(only.dataset.only); // -1: all
          const boxes = only.closest(".filter").querySelectorAll("[type=checkbox]");
          boxes.forEach((box, at) => { box.checked = wanted < 0 || at === wanted; });
          this.update();
        });
      }
      for (const narrow of this.all(".narrow")) {
        narrow.addEventListener("input", () => {
          for (const row of narrow.closest(".filter").querySelectorAll(".row:not(.empty)")) {
            row.hidden = !row.querySelector("bdi").textContent.toLowerCase().includes(narrow.value.toLowerCase());
          }
        });
      }
      const keys = {
        ArrowLeft: () => this.move(-0.15, 0),
        ArrowRight: () => this.move(0.15, 0),
        ArrowUp: () => this.move(0, 0.15),
        ArrowDown: () => this.move(0, -0.15),
        "+": () => this.zoom(1.5),
        "=": () => this.zoom(1.5),
        "-": () => this.zoom(1 / 1.5),
        0: () => this.zoom(0),
        Escape: () => this.choose(-1),
      };
      stage.addEventListener("keydown", (event) => {
        if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        keys[event.key]();
      });
    }

    listenToSearch() {
      const [search, results] = [this.find(".search input"), this.find(".results")];
      const matches = () => {
        const wanted = search.value.trim().toLowerCase();
        const rows = [];
        for (let i = 0; wanted && i < this.n && rows.length < 8; i += 1) {
          if (this.ids[i].toLowerCase().includes(wanted)) rows.push(i);
        }
        return rows;
      };
      const pick = (i) => {
        results.replaceChildren();
        this.goTo(i);
      };
      search.addEventListener("input", () => {
        const rows = matches().map((i) => element("li", "", button("", () => pick(i), name(this.ids[i]))));
        const nothing = search.value.trim() ? [element("li", "none", "no image has that in its id")] : [];
        results.replaceChildren(...(rows.length ? rows : nothing));
      });
      search.addEventListener("keydown", (event) => {
        if (event.key === "Escape") results.replaceChildren();
        const [first] = event.key === "Enter" ? matches() : [];
        if (first !== undefined) pick(first);
      });
    }
  }

  featcache.ready = Promise.all(Array.from(document.querySelectorAll(".map"), async (root) => {
    const data = document.getElementById(`${root.dataset.key}-points`).textContent;
    root.map = new FeatureMap(root, await decode(data));
    await root.map.start();
  }));
}
