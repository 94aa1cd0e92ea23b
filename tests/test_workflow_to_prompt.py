"""`convert_workflow`: from what the page saves to what ComfyUI executes."""

from __future__ import annotations

from typing import Any

import pytest

from streamblocks.tools.workflow_to_prompt import WorkflowError, convert_workflow

SCHEMAS: dict[str, dict[str, Any]] = {
    "Load": {"input": {"required": {"model": ["COMBO", {"options": ["tiny"]}]}}, "display_name": "Load It"},
    "Sample": {
        "input": {
            "required": {
                "recipe": ["RECIPE", {}],
                "prompt": ["STRING", {"multiline": True}],
                "seed": ["INT", {"control_after_generate": True}],
                "blocks": ["INT", {}],
            },
            "optional": {
                "image": ["IMAGE", {}],
                "strength": ["FLOAT", {}],
                "text": ["STRING", {"forceInput": True}],
            },
            "hidden": {"unique_id": ["UNIQUE_ID"]},
        },
    },
    "Invert": {"input": {"required": {"image": ["IMAGE", {}]}}},
    "Grown": {
        "input": {
            "required": {"model": ["COMBO", {"options": ["tiny"]}]},
            "optional": {"vae": ["COMBO", {"options": ["own", "other"], "default": "own"}], "more": ["FLOAT", {}]},
        },
    },
    "File": {"input_types": {"required": {"file": [["a.png"], {"image_upload": True}]}}},
}


def slot(name: str, kind: str, link: int | None = None) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link}


def load(mode: int = 0) -> dict[str, Any]:
    node = {"id": 1, "type": "Load", "mode": mode, "order": 0, "widgets_values": ["tiny"]}
    return {**node, "inputs": [slot("model", "COMBO")], "outputs": [{"name": "recipe", "type": "RECIPE"}]}


def sample(*links: dict[str, Any], values: list[Any] | None = None) -> dict[str, Any]:
    values = ["a fox", 7, "randomize", 5, 0.5] if values is None else values
    return {
        "id": 2,
        "type": "Sample",
        "order": 3,
        "widgets_values": values,
        "inputs": list(links),
        "outputs": [],
    }


def invert(number: int, link: int | None, mode: int = 0) -> dict[str, Any]:
    node = {
        "id": number,
        "type": "Invert",
        "mode": mode,
        "order": number - 8,
        "inputs": [slot("image", "IMAGE", link)],
    }
    return {**node, "outputs": [{"name": "IMAGE", "type": "IMAGE"}]}


def graph(*nodes: dict[str, Any], links: list[Any] | None = None) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links or [], "version": 0.4}


def inputs_of(prompt: dict[str, dict[str, Any]], node: str) -> dict[str, Any]:
    return dict(prompt[node]["inputs"])


def test_widgets_follow_the_schema_and_the_seed_control_is_skipped() -> None:
    workflow = graph(load(), sample(slot("recipe", "RECIPE", 1)), links=[[1, 1, 0, 2, 0, "RECIPE"]])
    prompt = convert_workflow(workflow, SCHEMAS)
    expected = {"prompt": "a fox", "seed": 7, "blocks": 5, "strength": 0.5, "recipe": ["1", 0]}
    assert inputs_of(prompt, "2") == expected
    assert prompt["1"] == {"inputs": {"model": "tiny"}, "class_type": "Load", "_meta": {"title": "Load It"}}
    assert list(prompt) == ["1", "2"]


def test_a_link_into_a_widget_wins_over_its_value() -> None:
    workflow = graph(load(), sample(slot("blocks", "INT", 1)), links=[[1, 1, 0, 2, 3, "INT"]])
    assert inputs_of(convert_workflow(workflow, SCHEMAS), "2")["blocks"] == ["1", 0]


def test_links_may_be_objects() -> None:
    link = {"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "RECIPE"}
    workflow = graph(load(), sample(slot("recipe", "RECIPE", 1)), links=[link])
    assert inputs_of(convert_workflow(workflow, SCHEMAS), "2")["recipe"] == ["1", 0]


def test_a_muted_node_goes_and_so_do_its_links() -> None:
    workflow = graph(load(mode=2), sample(slot("recipe", "RECIPE", 1)), links=[[1, 1, 0, 2, 0, "RECIPE"]])
    prompt = convert_workflow(workflow, SCHEMAS)
    assert list(prompt) == ["2"]
    assert "recipe" not in inputs_of(prompt, "2")


def test_bypassed_nodes_are_passed_through() -> None:
    links = [[1, 8, 0, 9, 0, "IMAGE"], [2, 9, 0, 10, 0, "IMAGE"], [3, 10, 0, 2, 0, "IMAGE"]]
    source = invert(8, None)
    workflow = graph(
        source, invert(9, 1, mode=4), invert(10, 2, mode=4), sample(slot("image", "IMAGE", 3)), links=links
    )
    prompt = convert_workflow(workflow, SCHEMAS)
    assert inputs_of(prompt, "2")["image"] == ["8", 0]
    assert sorted(prompt) == ["2", "8"]


def test_a_bypassed_node_without_a_fitting_input_gives_nothing() -> None:
    workflow = graph(load(mode=4), sample(slot("recipe", "RECIPE", 1)), links=[[1, 1, 0, 2, 0, "RECIPE"]])
    assert "recipe" not in inputs_of(convert_workflow(workflow, SCHEMAS), "2")


@pytest.mark.parametrize("kind", ["Note", "MarkdownNote"])
def test_notes_are_left_out(kind: str) -> None:
    note = {"id": 5, "type": kind, "order": 1, "widgets_values": ["read me"]}
    assert list(convert_workflow(graph(load(), note), SCHEMAS)) == ["1"]


def test_an_upload_button_has_a_saved_value_that_is_not_sent() -> None:
    node = {"id": 4, "type": "File", "title": "My file", "widgets_values": ["a.png", "image"]}
    prompt = convert_workflow(graph(node), SCHEMAS)
    assert prompt["4"] == {"inputs": {"file": "a.png"}, "class_type": "File", "_meta": {"title": "My file"}}


def test_a_list_is_wrapped_so_that_it_is_no_link() -> None:
    node = {"id": 4, "type": "File", "widgets_values": [["1", 0], "image"]}
    assert inputs_of(convert_workflow(graph(node), SCHEMAS), "4") == {"file": {"__value__": ["1", 0]}}


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(WorkflowError, match=r"Node 3 \(Gone\) is of a class that is not loaded: Gone"):
        convert_workflow(graph({"id": 3, "type": "Gone"}), SCHEMAS)


def test_a_wrong_number_of_values_says_what_the_class_wants() -> None:
    with pytest.raises(WorkflowError, match=r"has 2 widget values, its class has 5: prompt, seed, \(not sent\)"):
        convert_workflow(graph(sample(values=["a fox", 7])), SCHEMAS)


def test_optional_inputs_that_came_later_have_their_defaults() -> None:
    node = {"id": 5, "type": "Grown", "widgets_values": ["tiny"]}
    with pytest.raises(WorkflowError, match="has 1 widget values, its class has 3: model, vae, more"):
        # Nothing says what the page would send for the last one.
        convert_workflow(graph(node), SCHEMAS)
    schema = SCHEMAS["Grown"]["input"] | {"optional": {"vae": SCHEMAS["Grown"]["input"]["optional"]["vae"]}}
    prompt = convert_workflow(graph(node), {"Grown": {"input": schema}})
    assert inputs_of(prompt, "5") == {"model": "tiny", "vae": "own"}


def test_values_saved_under_other_names_are_refused() -> None:
    node = {**sample(), "widgets_values_named": {"seed": 7, "blocks": 3}}
    with pytest.raises(WorkflowError, match="saved with blocks = 3, but by position it is 5"):
        convert_workflow(graph(node), SCHEMAS)


def test_a_subgraph_is_refused() -> None:
    workflow = {**graph({"id": 3, "type": "uuid"}), "definitions": {"subgraphs": [{"id": "uuid"}]}}
    with pytest.raises(WorkflowError, match="is a subgraph"):
        convert_workflow(workflow, SCHEMAS)


def test_a_dynamic_input_is_refused() -> None:
    schemas = {"Grow": {"input": {"required": {"images": ["COMFY_AUTOGROW_V3", {}]}}}}
    with pytest.raises(WorkflowError, match=r"dynamic input \(images\)"):
        convert_workflow(graph({"id": 3, "type": "Grow"}), schemas)
