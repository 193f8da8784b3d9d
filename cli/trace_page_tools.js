"use strict";
// What the page's script is made of: elements, numbers as text, arrays.

const $ = (id) => document.getElementById(id);
const TYPES = { u1: Uint8Array, i4: Int32Array, f4: Float32Array };

/** A new element: its name with classes ("td.piece"), what it holds (text is only ever text), attributes. */
function make(name, content = "", attributes = {}) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  element.append(...[content].flat());
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Shade an element from 0 to 1. */
function shade(element, amount) {
  element.style.setProperty("--a", clamp(amount || 0, 0, 1).toFixed(3));
}

const percent = (x) => (Number.isNaN(x) ? "NaN" : x >= 0.0995 || x === 0 ? `${(100 * x).toFixed(0)} %` : `${(100 * x).toPrecision(2)} %`);
const figure = (x) => (Number.isNaN(x) ? "NaN" : x.toPrecision(Math.abs(x) >= 1000 ? 4 : 3));
const argsort = (values) => Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const clamp = (x, least, most) => Math.min(Math.max(x, least), most);

/** The values of an array that Python packed. */
async function unpack({ type, packed }) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new TYPES[type](await new Response(stream).arrayBuffer());
}

/** Rows of an array whose last axis has `size` elements. */
const row = (array, size, i) => array.subarray(i * size, (i + 1) * size);

const weight = (byte) => (byte / 255) ** 2;
