// Numbers for people. Whatever does not apply is a dash.

const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export function duration(ns, sign = false) {
  if (!known(ns)) return NONE;
  const plus = sign && ns > 0 ? "+" : "";
  const size = Math.abs(ns);
  if (size >= 10e9) return `${plus}${tenths.format(ns / 1e9)} s`;
  if (size >= 1e6 || size === 0) return `${plus}${tenths.format(ns / 1e6)} ms`;
  return `${plus}${tenths.format(ns / 1e3)} µs`;
}

export function bytes(count) {
  if (!known(count)) return NONE;
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${tenths.format(count / size)} ${unit}`;
  }
  return `${whole.format(count)} B`;
}

// Rates are decimal, as links and memory are sold. 0 means that nobody knows.
export function bytesPerSecond(rate) {
  if (!known(rate) || rate <= 0) return NONE;
  for (const [unit, size] of [["GB/s", 1e9], ["MB/s", 1e6]]) {
    if (rate >= size) return `${tenths.format(rate / size)} ${unit}`;
  }
  return `${tenths.format(rate / 1e3)} kB/s`;
}

export const count = (value) => (known(value) ? whole.format(value) : NONE);
export const perSecond = (rate) => (known(rate) && rate > 0 ? `${tenths.format(rate)} tokens/s` : NONE);
export const percent = (share) => (known(share) ? `${tenths.format(share * 100)}%` : NONE);
export const signedPercent = (share) => (known(share) && share > 0 ? `+${percent(share)}` : percent(share));
export const watts = (power) => (known(power) ? `${tenths.format(power)} W` : NONE);
export const joules = (energy) => (known(energy) && energy > 0 ? `${energy >= 10 ? whole.format(energy) : energy.toPrecision(2)} J` : NONE);
export const over = (amount, ns) => (ns > 0 ? (amount / ns) * 1e9 : NaN);
