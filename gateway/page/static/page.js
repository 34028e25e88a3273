// What the page does beyond what the server draws: times in the reader's zone, a fresh overview, and
// the print button. Everything works without it, but for these.
"use strict";

const language = document.documentElement.lang;
const clock = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });

function localise(place) {
  for (const time of place.querySelectorAll("time")) {
    time.title = time.dateTime;
    time.textContent = clock.format(new Date(time.dateTime));
  }
}

async function refresh(main) {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.href, { cache: "no-store", redirect: "error" });
    if (answer.status === 401) return location.reload(); // the visit is over: the form asks for the key
    if (!answer.ok) throw new Error(answer.status);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const open = main.querySelector("details")?.open;
    main.replaceChildren(...fresh.querySelector("main").childNodes);
    if (open) main.querySelector("details").open = true;
    localise(main);
    main.seen = Date.now();
    main.away = null;
  } catch {
    if (!main.away) {
      main.away = document.createElement("p");
      main.away.className = "trouble";
      main.away.setAttribute("role", "alert");
      const words = document.createElement("template");
      words.innerHTML = main.dataset.away; // our own words, one <bdi> in them
      words.content.querySelector("bdi").textContent = clock.format(main.seen);
      main.away.append(words.content);
      main.prepend(main.away);
    }
  }
}

localise(document);
const main = document.querySelector("main[data-refresh]");
if (main) {
  main.seen = Date.now();
  setInterval(refresh, Number(main.dataset.refresh) * 1000, main);
}
for (const button of document.querySelectorAll("[data-print]")) {
  button.hidden = false;
  button.addEventListener("click", () => print());
}
