/* What is said of an image: in the tip at the pointer, and in the panel of the chosen one. */
"use strict";

featcache.Words = class {
  constructor(points, told) {
    this.points = points;
    this.told = told;
    this.sprites = told.sheets ? new featcache.Sprites(told.key, told.sheets) : null;
  }

  thumb(i) {
    return this.sprites ? [this.sprites.canvas(i)] : [];
  }

  label(i) {
    const label = this.points.label[i];
    return label ? featcache.name(this.told.classes[label - 1]) : "no label";
  }

  prediction(i) {
    const { points, told } = this;
    const share = points.confidence ? Math.round(points.confidence[i] / 2.55) : 0;
    const sure = points.confidence ? `, ${share || "under\u00a01"}\u00a0%` : "";
    const said = featcache.name(told.classes[points.predicted[i]]);
    const line = featcache.element("p", "said", "predicted ", said, sure);
    if (points.label[i]) {
      const right = points.predicted[i] === points.label[i] - 1;
      const verdict = right ? ["right", "✓ right"] : ["wrong", "✗ wrong"];
      line.append(" ", featcache.element("span", ...verdict));
    }
    return line;
  }

  /** The thumbnail, where there are any, and lines: class, prediction, split, id. */
  of(i) {
    const { element, name } = featcache;
    const lines = [
      element("p", "class", this.label(i)),
      element("p", "split", this.points.test[i] ? "test image" : "training image"),
      element("p", "id", name(this.points.ids[i])),
    ];
    if (this.points.predicted) lines.splice(1, 0, this.prediction(i));
    return [...this.thumb(i), element("div", "", ...lines)];
  }

  neighbours(i) {
    const { k, neighbours } = this.points;
    return Array.from(neighbours.subarray(i * k, (i + 1) * k));
  }

  neighbour(i, other, choose) {
    const { element, name } = featcache;
    const { ids, label } = this.points;
    const button = featcache.button(
      label[other] === label[i] ? "" : "other",
      () => choose(other),
      ...this.thumb(other),
      element("span", "class", this.label(other)),
      element("span", "id", name(ids[other].split("/").pop())),
    );
    button.dataset.point = other;
    button.title = ids[other];
    return element("li", "", button);
  }

  /** Fill a panel with an image and its neighbours, each a button that chooses it. */
  fill(panel, i, { choose, clear }) {
    const { element } = featcache;
    const { label } = this.points;
    const near = this.neighbours(i);
    const same = near.filter((other) => label[other] === label[i]).length;
    const title = element(`h${this.told.level + 1}`, "title", "Chosen image");
    title.tabIndex = -1;
    panel.replaceChildren(
      element("div", "head", title, featcache.button("close", clear, "Clear")),
      element("div", "one", ...this.of(i)),
      element("p", "lead", `Its ${near.length} nearest in feature space, nearest first; ${same} of the same class:`),
      element("ol", this.sprites ? "near" : "near plain", ...near.map((other) => this.neighbour(i, other, choose))),
    );
    panel.dataset.point = i;
  }
};
