/* The map of features. Bokeh draws the points; what is under the pointer, and the marks of what is
   chosen, are found and drawn here. */
"use strict";

{
  const REACH = 9; // pixels around the pointer
  const WHOLE = 1.04; // of the map's side, with a margin

  /** Whether WebGL is drawn by hardware: software that pretends is slower than doing without. */
  const graphicsCard = () => {
    const canvas = document.createElement("canvas");
    const gl = canvas.getContext("webgl", { failIfMajorPerformanceCaveat: true });
    if (!gl) return false;
    const told = gl.getExtension("WEBGL_debug_renderer_info");
    const renderer = gl.getParameter(told ? told.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
    return !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(String(renderer));
  };

  /** Points in an order in which no class lies on top of the others: always the same one. */
  const shuffled = (n) => {
    const order = Uint32Array.from({ length: n }, (_, i) => i);
    let state = 1;
    for (let last = n - 1; last > 0; last -= 1) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      const other = state % (last + 1);
      [order[last], order[other]] = [order[other], order[last]];
    }
    return order;
  };

  class FeatureMap {
    constructor(root, told, points) {
      this.root = root;
      this.told = told;
      this.points = points;
      this.find = (selector) => root.querySelector(selector);
      this.stage = this.find(".stage");
      this.x = Float64Array.from(points.x, (step) => step / 65535);
      this.y = Float64Array.from(points.y, (step) => step / 65535);
      this.grid = new featcache.Grid(this.x, this.y);
      this.order = shuffled(points.n);
      this.visible = new Uint8Array(points.n);
      this.words = new featcache.Words(points, told);
      this.kinds = featcache.kindsOf(points, told);
      this.boxes = new featcache.Boxes(this.find(".filters"), this.kinds, () => this.update());
      this.chosen = -1;
    }

    async start() {
      Bokeh.set_log_level("warn");
      if (!graphicsCard()) this.told.plot.doc.roots[0].attributes.output_backend = "canvas";
      const views = await Bokeh.embed.embed_item(this.told.plot, this.find(".plot"));
      const { model, canvas_view: { events_el: events } } = Array.from(views)[0];
      events.tabIndex = -1; // the stage around it has the keys
      events.style.touchAction = "pan-y"; // a finger that goes up or down scrolls the page
      this.figure = model;
      this.source = model.document.get_model_by_name("points");
      this.wheel = model.toolbar.tools.find((tool) => tool.type === "WheelZoomTool");
      for (const range of [model.x_range, model.y_range]) range.change.connect(() => this.follow());
      this.listenToPointer();
      this.listenToKeys();
      this.listenToSearch();
      this.update();
      this.root.classList.add("ready");
    }

    // ---- what is drawn

    /** Hand Bokeh the points that are to be seen, in the colours of the moment. */
    update() {
      const mode = this.find("input[type=radio]:checked").value;
      const { of, looks } = this.kinds[mode];
      const colours = looks.map(featcache.colour);
      const all = Object.values(this.kinds);
      this.visible.forEach((_, i) => {
        this.visible[i] = Number(all.every((kind) => kind.on[kind.of[i]]));
      });
      const drawn = this.order.filter((i) => this.visible[i]);
      // What is rare lies on top: mistakes, and the test images.
      if (mode !== "class") drawn.sort((a, b) => of[a] - of[b]);
      this.shown = drawn.length;
      this.sizes = Float32Array.from(drawn, (i) => looks[of[i]].size || 1);
      this.size = this.wantedSize();
      this.source.data = {
        x: Float32Array.from(drawn, (i) => this.x[i]),
        y: Float32Array.from(drawn, (i) => this.y[i]),
        c: Uint32Array.from(drawn, (i) => colours[of[i]]),
        m: Array.from(drawn, (i) => looks[of[i]].marker),
        s: this.sizes.map((own) => own * this.size),
      };
      const { n } = this.points;
      const left = this.shown < n ? `${this.shown.toLocaleString("en")} of ` : "";
      this.find(".shown").textContent = `${left}${n.toLocaleString("en")} images`;
      this.boxes.paint(mode);
    }

    /** Points grow as one comes closer, so that their shapes can be seen. */
    wantedSize() {
      const plain = Math.max(3.5, Math.min(9, 3 + 140 / Math.sqrt(this.shown + 1)));
      return Math.min(12, plain * Math.max(1, WHOLE / this.view[2]) ** 0.45);
    }

    resize() {
      const size = this.wantedSize();
      if (Math.abs(size - this.size) < 0.4) return;
      this.size = size;
      this.source.data = { ...this.source.data, s: this.sizes.map((own) => own * size) };
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

    /** Bring a point into view. */
    reveal(i) {
      const [x, y, side] = this.view;
      const away = Math.max(Math.abs(this.x[i] - x), Math.abs(this.y[i] - y));
      if (away > 0.46 * side) this.view = [this.x[i], this.y[i], side];
    }

    /** After the view has moved: marks at once, sizes when it rests. */
    follow() {
      this.hideTip();
      cancelAnimationFrame(this.waiting);
      this.waiting = requestAnimationFrame(() => this.mark());
      clearTimeout(this.resting);
      this.resting = setTimeout(() => this.resize(), 200);
    }

    /** Where a point is on the stage, in pixels. */
    place(i) {
      const { x_range: across, y_range: up } = this.figure;
      const { width, height } = this.stage.getBoundingClientRect();
      return [
        ((this.x[i] - across.start) / (across.end - across.start)) * width,
        (1 - (this.y[i] - up.start) / (up.end - up.start)) * height,
      ];
    }

    /** The point under the pointer; -1 where there is none. */
    under(event) {
      const [x, y, side] = this.view;
      const box = this.stage.getBoundingClientRect();
      const right = x + ((event.clientX - box.left) / box.width - 0.5) * side;
      const up = y + (0.5 - (event.clientY - box.top) / box.height) * side;
      return this.grid.nearest(right, up, (REACH / box.width) * side, this.visible);
    }

    // ---- what is said, and marked

    showTip(i) {
      if (i === this.tipped) return;
      this.tipped = i;
      const [tip, ring] = [this.find(".tip"), this.find(".ring")];
      tip.replaceChildren(...this.words.of(i));
      tip.hidden = ring.hidden = false;
      const [x, y] = this.place(i);
      const { width, height } = this.stage.getBoundingClientRect();
      ring.style.transform = `translate(${x}px, ${y}px)`;
      const left = Math.max(4, Math.min(x + 14, width - tip.offsetWidth - 4));
      const below = y + 14 + tip.offsetHeight < height;
      const top = below ? y + 14 : Math.max(4, y - 14 - tip.offsetHeight);
      tip.style.transform = `translate(${left}px, ${top}px)`;
      this.stage.classList.add("over");
    }

    hideTip() {
      this.tipped = -1;
      this.find(".tip").hidden = this.find(".ring").hidden = true;
      this.stage.classList.remove("over");
    }

    choose(i) {
      this.chosen = i;
      this.words.fill(this.find(".chosen"), i, {
        choose: (other) => this.goTo(other),
        clear: () => this.clear(),
      });
      this.mark();
    }

    /** Choose a point that was not clicked: show where it is, and go on reading there. */
    goTo(i) {
      this.choose(i);
      this.reveal(i);
      this.find(".chosen .title").focus();
    }

    clear() {
      this.chosen = -1;
      const panel = this.find(".chosen");
      delete panel.dataset.point;
      panel.replaceChildren(featcache.element("p", "hint", panel.dataset.hint));
      this.mark();
    }

    /** Rings around the chosen point and its neighbours, and lines between them. */
    mark() {
      const { drawn } = featcache;
      const marks = [];
      if (this.chosen >= 0) {
        const [x, y] = this.place(this.chosen);
        const near = this.words.neighbours(this.chosen).map((other) => this.place(other));
        for (const [x2, y2] of near) marks.push(drawn("line", { x1: x, y1: y, x2, y2 }));
        for (const [cx, cy] of near) marks.push(drawn("circle", { cx, cy, r: 5.5 }));
        marks.push(drawn("circle", { cx: x, cy: y, r: 8.5, class: "self" }));
      }
      this.find(".marks").replaceChildren(...marks);
    }

    // ---- listening

    listenToPointer() {
      const { stage } = this;
      let pressed = [0, 0];
      const listen = (kind, does) => stage.addEventListener(kind, does, true);
      listen("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
      listen("pointermove", (event) => {
        const still = event.pointerType !== "touch" && !event.buttons;
        const i = still ? this.under(event) : -1;
        if (i < 0) this.hideTip();
        else this.showTip(i);
      });
      stage.addEventListener("pointerleave", () => this.hideTip());
      listen("click", (event) => {
        if (Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4) return; // a drag
        stage.focus({ preventScroll: true });
        const i = this.under(event);
        if (i >= 0) this.choose(i);
      });
      // The wheel scrolls the page until the map has been clicked; two fingers always zoom it.
      const coarse = matchMedia("(pointer: coarse)").matches;
      this.wheel.active = coarse;
      stage.addEventListener("focusin", () => { this.wheel.active = true; });
      stage.addEventListener("focusout", () => { this.wheel.active = coarse; });
      for (const button of this.root.querySelectorAll("[data-zoom]")) {
        button.addEventListener("click", () => this.zoom(Number(button.dataset.zoom)));
      }
      for (const radio of this.root.querySelectorAll("input[type=radio]")) {
        radio.addEventListener("change", () => this.update());
      }
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.update());
      new ResizeObserver(() => this.mark()).observe(stage);
    }

    listenToKeys() {
      const keys = {
        ArrowLeft: () => this.move(-0.15, 0),
        ArrowRight: () => this.move(0.15, 0),
        ArrowUp: () => this.move(0, 0.15),
        ArrowDown: () => this.move(0, -0.15),
        "+": () => this.zoom(1.5),
        "=": () => this.zoom(1.5),
        "-": () => this.zoom(1 / 1.5),
        0: () => this.zoom(0),
        Escape: () => this.clear(),
      };
      this.stage.addEventListener("keydown", (event) => {
        const does = keys[event.key];
        if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        does();
      });
    }

    listenToSearch() {
      const { element, name } = featcache;
      const search = this.find(".search input");
      const results = this.find(".results");
      const found = () => {
        const wanted = search.value.trim().toLowerCase();
        const rows = [];
        for (let i = 0; wanted && i < this.points.n && rows.length < 8; i += 1) {
          if (this.points.ids[i].toLowerCase().includes(wanted)) rows.push(i);
        }
        return rows;
      };
      const pick = (i) => {
        results.replaceChildren();
        this.goTo(i);
      };
      search.addEventListener("input", () => {
        const rows = found().map((i) =>
          element("li", "", featcache.button("", () => pick(i), name(this.points.ids[i]))),
        );
        const nothing = !rows.length && search.value.trim();
        if (nothing) rows.push(element("li", "none", "no image has that in its id"));
        results.replaceChildren(...rows);
      });
      search.addEventListener("keydown", (event) => {
        if (event.key === "Escape") results.replaceChildren();
        const [first] = event.key === "Enter" ? found() : [];
        if (first !== undefined) pick(first);
      });
    }
  }

  const begin = async (root) => {
    const told = JSON.parse(document.getElementById(`${root.dataset.key}-points`).textContent);
    root.map = new FeatureMap(root, told, await featcache.decode(told));
    await root.map.start();
  };
  featcache.ready = Promise.all(Array.from(document.querySelectorAll(".map"), begin));
}

// On paper everything is open.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.closed = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-closed]")) details.open = false;
});
