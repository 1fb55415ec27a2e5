// Elements made of text. Nothing here or elsewhere sets HTML: whatever a name or a prompt holds is shown as it is.

export const find = (id) => document.getElementById(id);

// `what` is "tag" or "tag.class"; attributes that are null or false are left out.
export function make(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(child))));
  return element;
}

// Rows of cells under `heads`; the first cell of a row is its heading. Cells that are numbers in text stand right.
export function table(heads, rows, caption = null) {
  const cell = (tag, value, first) => {
    const text = value === null || value === undefined ? "–" : value;
    return make(first ? `${tag}` : `${tag}.value`, first && tag === "th" ? { scope: "row" } : {}, text);
  };
  const head = make("tr", {}, ...heads.map((text, place) => make(place ? "th.value" : "th", { scope: "col" }, text)));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((value, place) => cell(place ? "td" : "th", value, !place))),
  );
  const parts = [make("thead", {}, head), make("tbody", {}, ...body)];
  if (caption) parts.unshift(make("caption", {}, caption));
  return make("table", {}, ...parts);
}
