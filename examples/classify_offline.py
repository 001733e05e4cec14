"""Classify without a server: the same model through vLLM's ``LLM``."""

from vllm import LLM

TEXTS = [
    "A warm, funny and beautifully acted film that I would gladly watch again.",
    "The plot makes no sense and the jokes are painfully dull.",
    "Friendly staff, spotless rooms and a wonderful breakfast.",
    "It broke after two days and nobody answered my complaint.",
]


def main() -> None:
    """Print label, probability and text of each."""
    llm = LLM(model="revmux-llama")
    labels = llm.llm_engine.model_config.hf_config.id2label
    for text, output in zip(TEXTS, llm.classify(TEXTS), strict=True):
        probs = output.outputs.probs
        best = max(range(len(probs)), key=probs.__getitem__)
        print(f"{labels[best]}\t{probs[best]:.3f}\t{text}")


# vLLM starts its engine in a new process, which imports this file again.
if __name__ == "__main__":
    main()
