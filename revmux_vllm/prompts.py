"""How a query and a document become one text, of which a language model says whether they fit."""

from typing import Any

from revmux_vllm.errors import UserError


def render(template: str, query: str, document: str) -> str:
    """One text of a pair.

    Args:
        template: Jinja over ``messages``, as vLLM's ``--chat-template`` for ``/score`` has it: the
            first is of the role ``query``, the second of ``document``, each with its ``content``.
        query, document: the pair.

    Raises:
        UserError: where it is no template.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    pair = {"query": query, "document": document}
    messages = [{"role": role, "content": text} for role, text in pair.items()]
    try:
        made: Any = render_jinja_template(conversations=[messages], chat_template=template)
    except TemplateError as error:
        raise UserError("`score_template`", f"cannot be rendered: {error}") from error
    return str(made[0][0])


def check_template(template: str) -> None:
    """Raise UserError unless ``template`` brings both texts, and no token that nobody gives it."""
    texts = "the query's own words", "the document's own words"
    made = render(template, *texts)
    if missing := [text for text in texts if text not in made]:
        cure = "write {{ messages[0]['content'] }} for the query, messages[1] for the document"
        problem = f"what it makes has not {' and '.join(missing)}"
        raise UserError("`score_template`", problem, cure=cure)
    if unknown := [name for name in ("bos_token", "eos_token") if name in template]:
        cure = "write the token itself"
        raise UserError("`score_template`", f"{', '.join(unknown)} is not known here", cure=cure)
