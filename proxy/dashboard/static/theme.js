// Light, dark, or as the system is; kept for the next visit.

import { find } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const STORED = "isthmus-theme";

// Calls `changed` whenever colours have changed.
export function setUpTheme(changed) {
  const button = find("theme");
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    changed();
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem(STORED, next);
    apply(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  const stored = localStorage.getItem(STORED);
  apply(THEMES.includes(stored) ? stored : "system");
}
