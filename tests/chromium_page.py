"""The real ComfyUI page in a headless Chromium, for tests.

    with ComfyPage(server.url) as page:
        page.load_workflow(path)
        prompt = page.graph_to_prompt()
        assert page.problems() == []

Nothing but the server is reachable from the page: other requests are cut off.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A camera that films a green wall, and that every page may use.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
READY = "() => window.app?.graph && window.app?.extensionManager && window.LiteGraph"

# What ComfyUI 0.33 with frontend 1.49.6 says of itself, on a page with no pack and no workflow. Each pattern
# must match the whole of "text @ path".
STOCK_NOISE = [
    # A style sheet that only exists if the user wrote one.
    r"Failed to load resource: .*404 \(Not Found\) @ /(api/userdata/)?user\.css",
    # Settings and folders that a new user does not have yet.
    r"Failed to load resource: .*404 \(Not Found\) @ /api/userdata/comfy\.templates\.json",
    r"Failed to load resource: .*404 \(Not Found\) @ /api/userdata\?dir=(workflows|subgraphs)&.*",
    # The page reads its graph once before creating it.
    r"ComfyApp graph accessed before initialization @ /assets/settingStore-[\w-]+\.js",
    # The default workflow names models that are not there, and asks Hugging Face for their sizes.
    r"Connecting to 'https://huggingface\.co/Comfy-Org/.*' violates .* @ /assets/missingModelMetadata-.*\.js",
    r"Fetch API cannot load https://huggingface\.co/Comfy-Org/.* @ /assets/missingModelMetadata-.*\.js",
]


def chromium_path() -> str | None:
    """The browser: `$CHROMIUM_PATH`, else a `chromium` or `google-chrome` on the path."""
    return os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")


def why_no_chromium() -> str | None:
    """A sentence saying what is missing, or None if the page can be opened."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    if chromium_path() is None:
        return "no Chromium found: install chromium or set CHROMIUM_PATH"
    return None


@dataclass
class ComfyPage:
    """The page of the ComfyUI at `url`; a context manager."""

    url: str
    width: int = 1600
    height: int = 900
    _said: list[str] = field(default_factory=list, init=False)
    _playwright: Playwright | None = field(default=None, init=False)
    _browser: Browser | None = field(default=None, init=False)
    _page: Page | None = field(default=None, init=False)

    def __enter__(self) -> ComfyPage:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(
                executable_path=chromium_path(), headless=True, args=CHROMIUM_ARGUMENTS
            )
            context = self._browser.new_context(viewport={"width": self.width, "height": self.height})
            self._page = context.new_page()
            self._listen(self._page)
            self._open(self._page)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the browser."""
        if self._browser is not None:
            self._browser.close()
        if self._playwright is not None:
            self._playwright.stop()
        self._browser = self._playwright = self._page = None

    def another_tab(self, place: str = "", prepare: Callable[[Page], None] = lambda _: None) -> ComfyPage:
        """The same page once more, at a place within it, in the same browser, which closes it."""
        tab = ComfyPage(self.url, self.width, self.height)
        tab._page = self.page.context.new_page()
        tab._listen(tab._page)
        prepare(tab._page)
        tab._open(tab._page, place)
        return tab

    @property
    def page(self) -> Page:
        """Playwright's page, for what this class does not do."""
        assert self._page is not None, "the page is not open"
        return self._page

    def _listen(self, page: Page) -> None:
        # A pattern, not a function: what does not match goes on without this process, which may be asleep.
        page.route(re.compile(f"^(?!{re.escape(self.url)}|data:|blob:)"), lambda route: route.abort())
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._said.append(f"uncaught: {error}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            where = message.location.get("url", "").removeprefix(self.url)
            self._said.append(f"{message.text} @ {where}")

    def _open(self, page: Page, place: str = "") -> None:
        page.goto(self.url + place)
        if place:
            # What is there may have a request open for as long as it is shown.
            page.wait_for_function(READY, timeout=60_000)
        else:
            self._wait_until_ready(page)

    def wait_until_ready(self) -> None:
        """Wait until a page that loads anew can be used."""
        self._wait_until_ready(self.page)

    @staticmethod
    def _wait_until_ready(page: Page) -> None:
        page.wait_for_function(READY, timeout=60_000)
        # The default workflow is loaded after the app is there; loading ours before that would lose the race.
        page.wait_for_function("() => window.app.graph.nodes.length > 0", timeout=60_000)
        page.wait_for_load_state("networkidle")

    def problems(self) -> list[str]:
        """Errors that the page reported or threw so far, apart from those of the stock page."""
        return [said for said in self._said if not any(re.fullmatch(noise, said, re.S) for noise in STOCK_NOISE)]

    def everything_said(self) -> list[str]:
        """All errors, those of the stock page included."""
        return list(self._said)

    def evaluate(self, expression: str, argument: object = None) -> Any:
        """The value of a JavaScript expression or function in the page."""
        return self.page.evaluate(expression, argument)

    def load_workflow(self, workflow: Path | dict[str, Any]) -> None:
        """Load a UI-format workflow, and wait until its nodes are on the canvas."""
        graph = json.loads(workflow.read_text()) if isinstance(workflow, Path) else workflow
        self.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)
        self.wait_for_graph(len(graph["nodes"]))

    def wait_for_graph(self, count: int) -> None:
        """Wait until the graph has `count` nodes and everything they asked the server for has come."""
        self.page.wait_for_function("count => window.app.graph.nodes.length === count", arg=count, timeout=30_000)
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(500)

    def graph_to_prompt(self) -> dict[str, Any]:
        """The API-format prompt that the page would send."""
        return dict(self.evaluate("async () => (await window.app.graphToPrompt()).output"))

    def workflow(self) -> dict[str, Any]:
        """The UI-format workflow that the page would save."""
        return dict(self.evaluate("() => window.app.graph.serialize()"))

    def unknown_nodes(self) -> list[str]:
        """The types in the graph that the server does not know (the page shows them as red boxes)."""
        expression = "() => app.graph.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))"
        return list(self.evaluate(expression))

    def fit(self) -> None:
        """Show the whole graph."""
        self.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
        self.page.wait_for_timeout(800)

    def screenshot(self, path: Path) -> None:
        """Write what is seen to a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
