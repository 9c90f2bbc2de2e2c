// What the pages of featcache serve share.
"use strict";
const at = (id) => document.getElementById(id);
const shown = (id, is) => { at(id).hidden = !is; };
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const count = (number) => number.toLocaleString("en");

// Names come from data sets: text and nothing else.
const made = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const named = (text) => made("bdi", text === "" ? "(no name)" : text);
