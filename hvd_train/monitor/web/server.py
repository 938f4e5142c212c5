"""The dashboard's web application: pages of a folder of runs, for those who have its token.

Every answer is read from the event logs; nothing is written. The first part of every address is the token,
since users of a login node share its loopback, and a cookie would be sent to their servers on other ports as
well. A request must name this host in `Host`, so that no other name leads a browser here, and come from no
other site.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from typing import Any, cast, final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hvd_train.errors import RunDirectoryError
from hvd_train.monitor.charts.figure import Over
from hvd_train.monitor.overview import Overview, age
from hvd_train.monitor.views import KINDS
from hvd_train.monitor.web import pages
from hvd_train.monitor.web.contents import WHICH, Page, compare_page, run_page
from hvd_train.monitor.web.site import Site
from hvd_train.record.wording import duration, number

_HOSTS = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors "
    "'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STATIC = {"draw.js": "text/javascript", "page.js": "text/javascript", "style.css": "text/css"}


@final
class Guard:
    """Middleware: refuses a request without the token, of another name or from another site. The application
    behind it sees addresses without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _, _, rest = scope["raw_path"].partition(b"?")[0].partition(b"/")
        given, slash, path = rest.partition(b"/")
        refusal = self._refusal(Request(scope), given)
        if refusal:
            await PlainTextResponse(refusal + "\n", 403, _HEADERS)(scope, receive, send)
            return
        path = slash + path or b"/"
        # Percent-encoded: a name may have bytes that no route matches. The views read `raw_path` as well.
        inner = {**scope, "raw_path": path, "path": path.decode("ascii", "replace")}
        await self._app(inner, receive, send)

    def _refusal(self, request: Request, token: bytes) -> str:
        host = request.headers.get("host", "")
        if _name(host) not in _HOSTS:
            return "This dashboard answers at 127.0.0.1 or localhost only: use ssh -L from another machine."
        origin = request.headers.get("origin")
        if origin is not None and origin.rpartition("://")[2] != host:
            return "This dashboard answers no request of another site."
        if request.method not in ("GET", "HEAD"):
            return "This dashboard only shows runs."
        if not hmac.compare_digest(token, self._token):
            return "The token is missing or wrong: open the address that `hvd_train dashboard` has printed."
        return ""


def _name(host: str) -> str:
    """The host in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def application(site: Site, token: str) -> Starlette:
    """The web application."""
    views = _Views(site, f"/{token}")
    routes = [
        Route("/", views.runs),
        Route("/data/runs", views.runs_data),
        Route("/run/{rest:path}", views.run),
        Route("/data/run/{rest:path}", views.run_data),
        Route("/compare", views.compare),
        Route("/data/compare", views.compare_data),
        Route("/plotly.js", views.plotly),
        Route("/{rest:path}", views.file),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)])


@final
class _Views:
    """What the addresses answer with. Not asynchronous: Starlette runs them in threads.

    Args:
        base: the beginning of every address.
    """

    def __init__(self, site: Site, base: str) -> None:
        self._site = site
        self._base = base

    def runs(self, request: Request) -> Response:
        """The list of the runs. This and the other pages come without what they show, which they ask for at
        once: the browser reads its scripts while this program reads the logs."""
        name, source = self._site.folder.resolve().name, f"{self._base}/data/runs"
        return self._html("runs.html", folder=name, source=source)

    def runs_data(self, request: Request) -> Response:
        """The table of the runs."""
        found, problem = self._site.runs()
        rows = [_row(run) for run in found]
        parts = pages.render("runs_table.html", base=self._base, runs=rows, problem=problem)
        version = hashlib.sha256(parts.encode()).hexdigest()[:16]
        if request.query_params.get("version") == version:
            return JSONResponse({"version": version}, headers=_HEADERS)
        return JSONResponse({"version": version, "parts": parts}, headers=_HEADERS)

    def run(self, request: Request) -> Response:
        """A page of a run."""
        name, which = _run_and_page(request, b"/run/")
        try:
            self._site.path_of(name)
        except RunDirectoryError as error:
            return self._missing(str(error))
        over, address = _over(request), address_of(name)
        return self._html(
            "run.html",
            name=name,
            address=f"{self._base}/run/{address}",
            which=which,
            all=WHICH,
            over=over,
            source=f"{self._base}/data/run/{address}/{which}?over={over}",
        )

    def run_data(self, request: Request) -> Response:
        """What a page of a run shows."""
        try:
            return _shown(
                request, run_page(self._site, *_run_and_page(request, b"/data/run/"), _over(request))
            )
        except RunDirectoryError as error:
            return JSONResponse({"problem": str(error)}, 404, _HEADERS)

    def compare(self, request: Request) -> Response:
        """Several runs side by side."""
        over = _over(request)
        chosen = "&".join(f"run={quote(address_of(name))}" for name in _chosen(request))
        source = f"{self._base}/data/compare?{chosen}&over={over}"
        return self._html("compare.html", chosen=chosen, over=over, source=source)

    def compare_data(self, request: Request) -> Response:
        """What the comparison shows."""
        return _shown(request, compare_page(self._site, _chosen(request), _over(request)))

    def plotly(self, request: Request) -> Response:
        """Plotly's script, which the browser may keep."""
        return FileResponse(pages.plotly(), headers={**_HEADERS, "Cache-Control": "private, max-age=86400"})

    def file(self, request: Request) -> Response:
        """A script or style of the pages."""
        name = request.path_params["rest"]
        if name not in _STATIC:
            return self._missing("There is no such page.")
        return Response(pages.text_of(name), media_type=_STATIC[name], headers=_HEADERS)

    def _missing(self, message: str) -> Response:
        return self._html("problem.html", 404, title="Not found", message=message)

    def _html(self, template: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(pages.render(template, base=self._base, **values), status, _HEADERS)


def address_of(name: str) -> str:
    """A run's name in an address: its bytes, whatever they are."""
    return quote(os.fsencode(name), safe="")


def _run_and_page(request: Request, prefix: bytes) -> tuple[str, str]:
    """The run and the page in an address, from its bytes: a name need not be UTF-8."""
    name, _, which = request.scope["raw_path"].removeprefix(prefix).partition(b"/")
    page = os.fsdecode(unquote_to_bytes(which))
    return os.fsdecode(unquote_to_bytes(name)), page if page in WHICH else WHICH[0]


def _chosen(request: Request) -> Sequence[str]:
    return [os.fsdecode(unquote_to_bytes(address)) for address in request.query_params.getlist("run")]


def _over(request: Request) -> Over:
    given = request.query_params.get("over", "")
    return cast("Over", given) if given in ("rounds", "samples", "seconds") else "rounds"


def _shown(request: Request, page: Page) -> Response:
    """The parts of a page, and its charts if they have changed."""
    content: dict[str, Any] = {"version": page.version, "parts": pages.render("parts.html", page=page)}
    if request.query_params.get("version") != page.version:
        content["charts"] = pages.plain(page.charts)
        content["frames"] = pages.render("charts.html", charts=page.charts)
    return Response(json.dumps(content), media_type="application/json", headers=_HEADERS)


def _row(run: Overview) -> dict[str, Any]:
    """A row of the table of runs: its figures as texts, and as values to sort by."""
    seconds = age(run)

    def figure(value: float | None, text: str) -> tuple[str, str]:
        return ("-", "") if value is None else (text, repr(float(value)))

    return {
        "name": run.name,
        "address": address_of(run.name),
        "state": run.state.name,
        "kind": KINDS.get(run.state.name, ""),
        "detail": f": {run.state.detail}" if run.state.name == "finished" else "",
        "problem": run.problem,
        "figures": [
            figure(seconds, f"{duration(seconds or 0.0)} ago"),
            figure(run.round, f"{run.round or 0:,}"),
            figure(run.last, number(run.last)),
            figure(run.best, number(run.best)),
            figure(run.samples_per_s, f"{run.samples_per_s or 0.0:,.0f}"),
            figure(run.ranks, f"{run.ranks or 0:,}"),
            figure(run.hosts, f"{run.hosts or 0:,}"),
        ],
    }
