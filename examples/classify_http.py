"""Ask a running ``vllm serve --model revmux-llama``, all texts at once.

Requests that wait together share composites, so send them concurrently and not one by one.
"""

import asyncio
from typing import Annotated

import httpx
import typer

TEXTS = [
    "A warm, funny and beautifully acted film that I would gladly watch again.",
    "The plot makes no sense and the jokes are painfully dull.",
    "Friendly staff, spotless rooms and a wonderful breakfast.",
    "It broke after two days and nobody answered my complaint.",
]


async def classify(client: httpx.AsyncClient, text: str) -> str:
    """One line of answer: label, probability, text."""
    response = await client.post("/classify", json={"model": "revmux-llama", "input": text})
    response.raise_for_status()
    answer = response.json()["data"][0]
    return f"{answer['label']}\t{max(answer['probs']):.3f}\t{text}"


async def classify_all(url: str) -> list[str]:
    """Answers in the order of ``TEXTS``."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await asyncio.gather(*(classify(client, text) for text in TEXTS))


def main(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
) -> None:
    """Print label, probability and text of each."""
    print("\n".join(asyncio.run(classify_all(url))))


if __name__ == "__main__":
    typer.run(main)
