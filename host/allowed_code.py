"""Where the user's list of allowed code is, and the question that a refused run puts to the page."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from server import PromptServer

from ..stream.code_consent import LIST_NAME, AllowedCode, read_allowed_code
from ..stream.code_files import RepositoryCode
from .code_questions import CodeQuestion

_FOLDER = "streamblocks"


def allowed_code() -> AllowedCode:
    """What the list allows at this moment."""
    return read_allowed_code(allowed_code_file())


def allowed_code_file() -> Path:
    """The list, in a folder of the user's that ComfyUI's routes for the files of users neither read nor write."""
    return Path(folder_paths.get_system_user_directory(_FOLDER)) / LIST_NAME


def ask_about_code(code: RepositoryCode) -> None:
    """Let the page that queued the prompt ask whether this code may run; without a page, nobody is asked.

    The event `streamblocks.code` hands out the question's id and token.
    """
    server = PromptServer.instance
    app, client = getattr(server, "app", None), getattr(server, "client_id", None)
    if app is None or client is None:
        return
    # Only a server brings aiohttp.
    from .code_routes import QUESTIONS

    questions = app.get(QUESTIONS)
    if questions is None:
        return
    question = CodeQuestion(code, allowed_code_file())
    questions.begin(question)
    server.send_sync("streamblocks.code", {"id": question.id, "token": question.token, "place": code.place}, client)
