"""What each address of ``sft-dist ui`` answers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from sft_dist.errors import ConfigError, SftError
from sft_dist.hardware.gpus import all_gpus
from sft_dist.pages.local_server import FORBIDDEN, Answer, Asked, LocalServer, json_answer
from sft_dist.report.compare import compare, names_of, read_reports
from sft_dist.report.compare_page import render_comparison
from sft_dist.report.differ import AREAS, diff, told_apart
from sft_dist.report.page import render as render_report
from sft_dist.ui import run_view
from sft_dist.ui.commands import CHOICES, FIELDS, Kind, address_of, as_argument, wanted
from sft_dist.ui.discovery import Finder
from sft_dist.ui.pages import WRITTEN, part, show, with_charts
from sft_dist.ui.places import Places, Refused
from sft_dist.ui.tasks import HTML, JSON, MAX_RUNNING, Busy, Task, Tasks
from sft_dist.ui.watched import Reports, SlowAsk, Statuses

# A table of many runs is shown before all of them were read.
FIRST_LOOK_S, LOOK_S = 1.0, 2.0

TITLES = {"plan": "Plan of", "audit": "Audit of", "show": "Rows of"}


class UiServer:
    """``serve`` answers until ``close``, which also ends the commands that pages have started.

    Args:
        folder: only what is in it is shown.
        port: 0: any that is free.

    Raises:
        ConfigError: there is no such folder, or the port is taken.
    """

    def __init__(self, folder: Path, *, port: int) -> None:
        self.places = Places(folder)
        self._finder = Finder(self.places.root)
        ask = SlowAsk()
        self._statuses, self._reports = Statuses(ask=ask), Reports(ask=ask)
        self._server = LocalServer(self.respond, port=port)
        self.key, self.port, self.address = self._server.key, self._server.port, self._server.address
        self.tasks = Tasks()

    def serve(self) -> None:
        self._server.serve()

    def close(self) -> None:
        self._server.close()
        self.tasks.close()

    def respond(self, asked: Asked) -> Answer:
        opens = self._server.opens(asked)
        if not opens and not self._server.has_key(asked):
            return FORBIDDEN
        try:
            answer = self._answer(asked)
        except Refused as refused:
            answer = self._problem(refused.status, refused.line)
        except SftError as error:
            answer = self._problem(HTTPStatus.UNPROCESSABLE_ENTITY, error.what, error.fix)
        if opens:
            headers = {**answer.headers, **self._server.set_cookie}
            answer = Answer(answer.text, answer.kind, answer.status, answer.policy, headers)
        return answer

    def _answer(self, asked: Asked) -> Answer:
        match asked.method, asked.path:
            case "GET", "/":
                return self._runs()
            case "GET", "/runs.json":
                return json_answer({"rows": self._rows(LOOK_S)})
            case "GET", "/run":
                return self._run(asked)
            case "GET", "/run.json":
                return self._run_now(asked)
            case "GET", "/report":
                _, data = self._reports.of(self.places.find(asked.one("run")))
                return Answer(render_report(data), policy=with_charts())
            case "GET", "/compare":
                return self._compare(asked)
            case "GET", "/compared":
                reports = [self._reports.of(folder)[1] for folder in self._chosen(asked)]
                return Answer(render_comparison(compare(reports)), policy=with_charts())
            case "GET", "/plan":
                return self._form("plan", _first(asked.query))
            case "GET", "/audit":
                return self._form("audit", _first(asked.query))
            case "POST", "/plan":
                return self._start("plan", asked)
            case "POST", "/audit":
                return self._start("audit", asked)
            case "GET", "/task":
                return self._task(self._task_of(asked))
            case "GET", "/task.json":
                return self._task_now(self._task_of(asked), asked)
            case "GET", "/result":
                return self._result(self._task_of(asked), asked)
            case "POST", "/cancel":
                task = self._task_of(Asked("POST", asked.path, _sent(asked)))
                task.cancel()
                return _see(f"/task?id={task.number}")
        return self._problem(HTTPStatus.NOT_FOUND, "there is no such page")

    def _page(self, name: str, here: str, title: str, *, status: HTTPStatus = HTTPStatus.OK, **values: Any) -> Answer:
        return show(name, status=status, here=here, title=title, root=str(self.places.root), **values)

    def _problem(self, status: HTTPStatus, what: str, fix: str = "") -> Answer:
        return self._page("problem", "", "This is not shown", status=status, what=what, fix=fix)

    # Runs

    def _rows(self, budget_s: float) -> list[dict[str, Any]]:
        return run_view.rows_of(self._statuses.of(self._finder.found().runs, budget_s=budget_s), self.places)

    def _runs(self) -> Answer:
        rows = self._rows(FIRST_LOOK_S)
        return self._page("runs", "runs", "Runs", rows=rows, is_cut=self._finder.found().is_cut)

    def _run(self, asked: Asked) -> Answer:
        folder = self.places.find(asked.one("run"))
        version, data = self._reports.of(folder)
        name, argument = self.places.name_of(folder), as_argument(folder)
        has_config = (folder / "config.yaml").is_file()
        # A report may be kept for long; how the run stands is of this moment.
        status = self._statuses.of([folder])[folder] or data.status
        quoted = shlex.quote(argument)
        return self._page(
            "run", "runs", folder.name, folder=str(folder), version=version,
            standing=run_view.standing(status), log=run_view.read_log(folder, asked.one("rank", "0"), self.places),
            told=run_view.told(data), query=urlencode({"run": name}),
            config=urlencode({"config": f"{name}/config.yaml"}) if has_config else None,
            commands=[command for command in (
                f"sft-dist status {quoted}", f"sft-dist logs {quoted} --follow",
                run_view.review_command(folder, data, quoted)) if command],
            **run_view.measured(data),
        )  # fmt: skip

    def _run_now(self, asked: Asked) -> Answer:
        folder = self.places.find(asked.one("run"))
        status = self._statuses.of([folder])[folder]
        if status is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"{self.places.name_of(folder)} holds no run any more")
        version, data = self._reports.of(folder)
        log = run_view.read_log(folder, asked.one("rank", "0"), self.places)
        standing = run_view.standing(status)
        found = {
            "version": version, "kind": standing["kind"], "line": standing["line"], "told": run_view.told(data),
            "standing": part("run_standing", standing=standing), "ranks": log.ranks, "log": log.text,
        }  # fmt: skip
        if asked.one("version") != str(version):
            found["measured"] = part("run_measured", **run_view.measured(data))
        return json_answer(found)

    # Compare

    def _chosen(self, asked: Asked) -> list[Path]:
        return [self.places.find(name) for name in asked.query.get("run", [])]

    def _compare(self, asked: Asked) -> Answer:
        folders = self._chosen(asked)
        if not folders:
            names = [self.places.name_of(folder) for folder in self._finder.found().runs]
            return self._page("compare", "compare", "Compare runs", runs=sorted(names), names=[])
        read_reports(folders, lambda folder: self._reports.of(folder)[1])
        arguments = [as_argument(folder) for folder in folders]
        found = diff(folders[0], folders[1]) if len(folders) == 2 else None
        areas = [] if found is None else [
            (heading, own) for area, heading in AREAS.items()
            if (own := [each for each in found.differences if each.area == area])
        ]  # fmt: skip
        commands = [shlex.join(["sft-dist", "compare", *arguments, "--out", "compare.html"])]
        commands += [] if found is None else [shlex.join(["sft-dist", "diff", *arguments])]
        return self._page(
            "compare", "compare", f"{len(folders)} runs side by side", runs=[], names=names_of(folders), areas=areas,
            apart=None if found is None else told_apart(found.apart), commands=commands,
            paths=[self.places.name_of(folder) for folder in folders],
            query=urlencode([("run", self.places.name_of(folder)) for folder in folders]),
        )  # fmt: skip

    # Plan, audit, rows

    def _form(
        self, page: str, given: Mapping[str, str], *, status: HTTPStatus = HTTPStatus.OK, error: Sequence[str] = ()
    ) -> Answer:
        configs = [self.places.name_of(path) for path in self._finder.found().configs]
        chosen = given.get("config", "")
        if chosen and chosen not in configs:
            configs.insert(0, self.places.name_of(self.places.find(chosen)))
        kinds = ("plan",) if page == "plan" else ("audit", "show")
        title = "Plan" if page == "plan" else "Audit"
        return self._page(
            page, page, title, status=status, configs=configs, error=error,
            given={name: given.get(name, "") for name in FIELDS}, gpus=sorted(all_gpus()),
            choices=CHOICES, tasks=self.tasks.of_kinds(*kinds), cwd=str(Path.cwd()),
        )  # fmt: skip

    def _start(self, page: str, asked: Asked) -> Answer:
        given = _first(_sent(asked))
        kind: Kind = "plan" if page == "plan" else "show" if given.get("do") == "show" else "audit"
        try:
            what = wanted(kind, given, self.places)
            title = f"{TITLES[kind]} {self.places.name_of(what.config)}"
            task = self.tasks.start(kind, title, what.with_result_in, again=address_of(kind, given))
        except ConfigError as error:
            said = [error.what, error.fix]
            return self._form(page, given, status=HTTPStatus.UNPROCESSABLE_ENTITY, error=said)
        except Busy:
            said = [f"{MAX_RUNNING} commands are running already", "wait until one has ended, or cancel it"]
            return self._form(page, given, status=HTTPStatus.TOO_MANY_REQUESTS, error=said)
        return _see(f"/task?id={task.number}")

    def _task_of(self, asked: Asked) -> Task:
        task = self.tasks.find(asked.one("id"))
        if task is None:
            raise Refused(HTTPStatus.NOT_FOUND, "this command is no longer known here")
        return task

    def _task(self, task: Task) -> Answer:
        here = "plan" if task.kind == "plan" else "audit"
        is_over = task.exit_code is not None
        return self._page(
            "task", here, task.title, task=task, command=shlex.join(task.command), is_over=is_over, text=task.text,
            **_end(task),
        )  # fmt: skip

    def _task_now(self, task: Task, asked: Asked) -> Answer:
        begins = int(asked.one("from")) if asked.one("from").isdecimal() else 0
        is_over, text = task.exit_code is not None, task.text
        found: dict[str, Any] = {"text": text[begins:], "at": len(text), "took": round(task.took_s), "over": is_over}
        if is_over:
            found["end"] = part("task_end", task=task)
            found["result"] = part("task_result", task=task, **_end(task))
        return json_answer(found)

    def _result(self, task: Task, asked: Asked) -> Answer:
        is_json = asked.one("form") == "json"
        path = task.file(JSON if is_json else HTML)
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "the command has written no such result")
        text = path.read_text(encoding="utf-8")
        if is_json:
            return Answer(
                text, "application/json", headers={"Content-Disposition": 'attachment; filename="audit.json"'}
            )
        return Answer(text, policy=WRITTEN)


def _end(task: Task) -> dict[str, Any]:
    """What is said of a command that has ended."""
    return {"has_page": task.file(HTML) is not None, "has_json": task.file(JSON) is not None}


def _sent(asked: Asked) -> dict[str, list[str]]:
    """The fields of a form."""
    return parse_qs(asked.body.decode("utf-8", "replace"), keep_blank_values=True)


def _first(query: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: values[0] for name, values in query.items()}


def _see(address: str) -> Answer:
    """After a form: the page that shows what came of it, which may be loaded again without sending the form again."""
    return Answer("", "text/plain", HTTPStatus.SEE_OTHER, headers={"Location": address})
