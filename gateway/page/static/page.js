// What the page does beyond what the server draws: times in the reader's zone, a fresh overview, and
// the print button. Everything works without it, but for these.
"use strict";

const language = document.documentElement.lang;
const clock = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
const PATIENCE = 8000; // milliseconds for an answer

function localise(place) {
  for (const time of place.querySelectorAll("time")) {
    time.title = time.dateTime;
    time.textContent = clock.format(new Date(time.dateTime));
  }
}

// Only what has changed is replaced, so that the focus and an open list stay where they are.
function take(fresh, drawn) {
  for (const part of document.querySelectorAll("main [id]")) {
    const now = fresh.getElementById(part.id)?.innerHTML ?? "";
    if (now === drawn[part.id]) continue;
    const focus = part.contains(document.activeElement) && document.activeElement.getAttribute("href");
    part.innerHTML = now; // drawn by the same server as all the rest, and no script runs in it
    drawn[part.id] = now;
    localise(part);
    if (focus) part.querySelector(`[href="${CSS.escape(focus)}"]`)?.focus();
  }
  document.title = fresh.title;
}

async function keepFresh(main) {
  const drawn = {};
  for (const part of main.querySelectorAll("[id]")) drawn[part.id] = part.innerHTML;
  let seen = Date.now();
  let away = null;

  async function refresh() {
    try {
      const signal = AbortSignal.timeout(PATIENCE);
      const answer = await fetch(location.href, { cache: "no-store", redirect: "error", signal });
      if (answer.status === 401) return location.reload(); // the login is over: the form asks for the key
      if (!answer.ok) throw new Error(answer.status);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (document.getSelection().isCollapsed) take(fresh, drawn); // or who copies loses the place
      seen = Date.now();
      away?.remove();
      away = null;
    } catch {
      if (away) return;
      away = document.createElement("p");
      away.className = "trouble";
      away.setAttribute("role", "alert");
      away.innerHTML = main.dataset.away; // our own words, one <bdi> in them
      away.querySelector("bdi").textContent = clock.format(seen);
      main.prepend(away);
    }
  }

  let waiting;
  async function again() {
    clearTimeout(waiting);
    if (!document.hidden) await refresh();
    waiting = setTimeout(again, Number(main.dataset.refresh) * 1000);
  }
  document.addEventListener("visibilitychange", () => document.hidden || again());
  waiting = setTimeout(again, Number(main.dataset.refresh) * 1000);
}

const main = document.querySelector("main[data-refresh]");
if (main) keepFresh(main);
localise(document);
for (const button of document.querySelectorAll("[data-print]")) {
  button.hidden = false;
  button.addEventListener("click", () => print());
}
