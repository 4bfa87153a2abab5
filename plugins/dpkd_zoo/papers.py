"""The papers and code bases that the built-in losses come from."""

from __future__ import annotations

from dataclasses import replace

from dpkd.api import Source

__all__ = ["AKL", "CPO", "DPKD", "DPKD_CODE", "HINTON", "IPO", "LMOPS", "MINILLM", "SEQKD", "SIMPO", "at"]


def _source(title: str, url: str, key: str, authors: str, year: int) -> Source:
    bibtex = (
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n  url = {{{url}}}\n}}"
    )
    return Source(title, url, bibtex=bibtex)


def at(source: Source, where: str) -> Source:
    """The same source, at an equation or section."""
    return replace(source, where=where)


DPKD = _source(
    "Direct Preference Knowledge Distillation for Large Language Models",
    "https://arxiv.org/abs/2406.19774", "li2024dpkd",
    "Li, Yixing and Gu, Yuxian and Dong, Li and Wang, Dequan and Cheng, Yu and Wei, Furu", 2024,
)  # fmt: skip
DPKD_CODE = Source("Released code of DPKD (LMOps, dpkd/)", "https://github.com/microsoft/LMOps")
LMOPS = Source("Released code of MiniLLM (LMOps, minillm/)", "https://github.com/microsoft/LMOps")
MINILLM = _source(
    "MiniLLM: Knowledge Distillation of Large Language Models",
    "https://arxiv.org/abs/2306.08543", "gu2024minillm",
    "Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie", 2024,
)  # fmt: skip
AKL = _source(
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    "https://arxiv.org/abs/2404.02657", "wu2024akl",
    "Wu, Taiqiang and Tao, Chaofan and Wang, Jiahao and Yang, Runming and Zhao, Zhe and Wong, Ngai", 2024,
)  # fmt: skip
HINTON = _source(
    "Distilling the Knowledge in a Neural Network",
    "https://arxiv.org/abs/1503.02531", "hinton2015distilling",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff", 2015,
)  # fmt: skip
SEQKD = _source(
    "Sequence-Level Knowledge Distillation",
    "https://arxiv.org/abs/1606.07947", "kim2016sequence", "Kim, Yoon and Rush, Alexander M.", 2016,
)  # fmt: skip
IPO = _source(
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    "https://arxiv.org/abs/2310.12036", "azar2023ipo",
    "Azar, Mohammad Gheshlaghi and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and "
    "Valko, Michal and Munos, Rémi", 2023,
)  # fmt: skip
CPO = _source(
    "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    "https://arxiv.org/abs/2401.08417", "xu2024cpo",
    "Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin and "
    "Murray, Kenton and Kim, Young Jin", 2024,
)  # fmt: skip
SIMPO = _source(
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "https://arxiv.org/abs/2405.14734", "meng2024simpo", "Meng, Yu and Xia, Mengzhou and Chen, Danqi", 2024,
)  # fmt: skip
