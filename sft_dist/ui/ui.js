"use strict";
(() => {
  const EVERY_MS = 2000, LOST_MS = 5000, PATIENCE_MS = 20000;
  const at = (id) => document.getElementById(id);

  // The key opens the page once; from then on a cookie does, and the address can be shown to others.
  const address = new URL(location.href);
  if (address.searchParams.has("key")) {
    address.searchParams.delete("key");
    history.replaceState(null, "", address.pathname + address.search + address.hash);
  }

  const clock = () => new Date().toLocaleTimeString("en-GB");
  const announce = (text) => { at("changes").textContent = `${clock()} ${text}`; };

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const said = button.firstChild;
      try {
        await navigator.clipboard.writeText(button.dataset.copy);
        said.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(button.parentElement.querySelector("code"));
        said.textContent = "Selected";
      }
      setTimeout(() => { said.textContent = "Copy"; }, 2000);
    });
  }

  // A page that a command has written is as high as it is, so that there is one scrollbar.
  const fit = (frame) => {
    const measure = () => {
      const written = frame.contentDocument && frame.contentDocument.documentElement;
      // Of its content: what it is shown in would count with the rest, and could only grow.
      if (written) frame.style.height = `${Math.ceil(written.getBoundingClientRect().height) + 4}px`;
    };
    frame.addEventListener("load", measure);
    addEventListener("resize", measure);
    measure();
  };
  document.querySelectorAll("iframe.written").forEach(fit);

  // Looks again and again while the page can be seen; `take` returns true when there is nothing more to come.
  const live = (makeAddress, take) => {
    let timer = 0, looking = false, over = false, seen = clock();
    const lost = (text) => {
      if (at("lost").textContent !== text) at("lost").textContent = text;
      at("lost").hidden = !text;
    };
    const look = async () => {
      clearTimeout(timer);
      if (looking || over || document.hidden) return;
      looking = true;
      let wait = EVERY_MS;
      try {
        const answer = await fetch(makeAddress(), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
        if (answer.status === 403) {
          lost("The program was started again: open the address that it has printed.");
          over = true;
        } else if (!answer.ok) {
          lost(`What is shown is of ${seen}: the program answers with ${answer.status}.`);
          wait = LOST_MS;
        } else {
          over = take(await answer.json()) === true;
          seen = clock();
          lost("");
        }
      } catch {
        lost(`What is shown is of ${seen}: the program that shows this page has ended, or cannot be reached.`);
        wait = LOST_MS;
      }
      looking = false;
      if (!over) timer = setTimeout(look, wait);
    };
    document.addEventListener("visibilitychange", look);
    timer = setTimeout(look, EVERY_MS);
    return look;
  };

  const replaceHtml = (element, html) => {
    if (element.dataset.html === html) return;
    element.dataset.html = html;
    element.innerHTML = html;
  };

  const runsPage = (form) => {
    const body = form.querySelector("tbody"), cells = ["step", "loss", "left", "sign", "cost", "line"];
    const lineOf = (path) => [...body.rows].find((line) => line.dataset.path === path);
    const filter = at("filter");
    const sift = () => {
      const wanted = filter.value.trim().toLowerCase();
      for (const line of body.rows) line.hidden = !line.textContent.toLowerCase().includes(wanted);
    };
    filter.parentElement.hidden = false;
    filter.addEventListener("input", sift);
    filter.addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });

    const add = (row) => {
      const line = at("row").content.firstElementChild.cloneNode(true);
      line.dataset.path = row.path;
      line.querySelector("input").value = row.path;
      line.querySelector("a").href = `/run?run=${encodeURIComponent(row.path)}`;
      body.prepend(line);
      return line;
    };
    live(() => form.dataset.live, ({ rows }) => {
      const changes = [];
      for (const row of rows) {
        let line = lineOf(row.path);
        const badge = () => line.querySelector("[data-cell=state] .badge");
        if (!line) {
          line = add(row);
          changes.push(`${row.name} is new: ${row.state}`);
        } else if (badge().textContent !== row.state && badge().textContent !== "reading") {
          changes.push(`${row.name}: ${row.state}`);
        }
        badge().textContent = row.state;
        badge().className = `badge ${row.style}`;
        line.querySelector("a").textContent = row.name;
        line.querySelector("input").setAttribute("aria-label", `Compare ${row.name}`);
        for (const name of cells) {
          const cell = line.querySelector(`[data-cell=${name}]`);
          if (cell.textContent !== row[name]) cell.textContent = row[name];
        }
      }
      const known = new Set(rows.map((row) => row.path));
      for (const line of [...body.rows]) if (!known.has(line.dataset.path)) line.remove();
      form.hidden = !rows.length;
      at("none").hidden = rows.length > 0;
      sift();
      if (changes.length > 3) announce(`${changes.length} runs have changed`);
      else if (changes.length) announce(changes.join("; "));
    });
  };

  const runPage = (section) => {
    const log = at("log"), rank = at("rank"), measured = at("measured"), words = log.textContent;
    let ranks = [...rank.options].map((option) => option.value).join();

    // The scale that was chosen for a figure stays when the figure grows.
    const grow = (html) => {
      const logs = [...measured.querySelectorAll('[data-scale="log"][aria-pressed="true"]')].map((each) => each.closest("figure").id);
      measured.innerHTML = html;
      bindCharts();
      for (const id of logs) document.querySelector(`#${CSS.escape(id)} [data-scale="log"]`)?.click();
    };
    const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 30;
    const showLog = (text) => {
      if (log.textContent === text) return;
      const follows = atEnd();
      log.textContent = text;
      if (follows) log.scrollTop = log.scrollHeight;
    };
    log.scrollTop = log.scrollHeight;

    const look = live(
      () => `${section.dataset.live}&version=${section.dataset.version}&rank=${encodeURIComponent(rank.value)}`,
      (found) => {
        replaceHtml(at("standing"), found.standing);
        // Who reads values with the keys, or text of an answer, keeps the place: it grows when they have left.
        if (found.measured !== undefined && !measured.contains(document.activeElement)) {
          grow(found.measured);
          section.dataset.version = found.version;
        }
        const changes = [];
        if (found.kind !== section.dataset.kind) changes.push(found.line);
        if (found.told && found.told !== section.dataset.told) changes.push(found.told);
        section.dataset.kind = found.kind;
        section.dataset.told = found.told;
        if (changes.length) announce(changes.join("; "));
        if (found.ranks.length && found.ranks.join() !== ranks) {
          const chosen = rank.value;
          ranks = found.ranks.join();
          rank.replaceChildren(...found.ranks.map((each) => new Option(each === "job" ? "the SLURM job" : `rank ${each}`, each)));
          rank.value = found.ranks.includes(chosen) ? chosen : found.ranks[0];
        }
        showLog(found.log || words);
      },
    );
    rank.addEventListener("change", look);
  };

  const taskPage = (task) => {
    const output = at("output");
    let from = Number(output.dataset.from);
    output.scrollTop = output.scrollHeight;
    live(() => `${task.dataset.live}&from=${from}`, (found) => {
      if (found.text) {
        const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 30;
        output.append(found.text);
        if (follows) output.scrollTop = output.scrollHeight;
      }
      from = found.at;
      if (!found.over) { at("took").textContent = `for ${found.took} s`; return false; }
      const focused = at("cancel").contains(document.activeElement);
      at("cancel").remove();
      at("end").innerHTML = found.end;
      at("result").innerHTML = found.result;
      at("result").querySelectorAll("iframe.written").forEach(fit);
      if (focused) at("main").focus();
      announce(at("end").querySelector(".outcome").textContent.trim());
      return true;
    });
  };

  if (at("runs")) runsPage(at("runs"));
  if (at("run")) runPage(at("run"));
  if (at("task") && at("task").dataset.live) taskPage(at("task"));
})();
