"""The papers and code bases that the built-in losses come from."""

from __future__ import annotations

from dataclasses import replace

from dpkd.api import Source


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
    "https://arxiv.org/abs/2406.19774",
    "li2024dpkd",
    "Li, Yixing and Gu, Yuxian and Dong, Li and Wang, Dequan and Cheng, Yu and Wei, Furu",
    2024,
)
DPKD_CODE = Source("Released code of DPKD (LMOps, dpkd/)", "https://github.com/microsoft/LMOps")
LMOPS = Source("Released code of MiniLLM (LMOps, minillm/)", "https://github.com/microsoft/LMOps")
MINILLM = _source(
    "MiniLLM: Knowledge Distillation of Large Language Models",
    "https://arxiv.org/abs/2306.08543",
    "gu2024minillm",
    "Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie",
    2024,
)
AKL = _source(
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    "https://arxiv.org/abs/2404.02657",
    "wu2024akl",
    "Wu, Taiqiang and Tao, Chaofan and Wang, Jiahao and Yang, Runming and Zhao, Zhe and Wong, Ngai",
    2024,
)
HINTON = _source(
    "Distilling the Knowledge in a Neural Network",
    "https://arxiv.org/abs/1503.02531",
    "hinton2015distilling",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    2015,
)
SEQKD = _source(
    "Sequence-Level Knowledge Distillation",
    "https://arxiv.org/abs/1606.07947",
    "kim2016sequence",
    "Kim, Yoon and Rush, Alexander M.",
    2016,
)
IPO = _source(
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    "https://arxiv.org/abs/2310.12036",
    "azar2023ipo",
    "Azar, Mohammad Gheshlaghi and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and "
    "Valko, Michal and Munos, Rémi",
    2023,
)
CPO = _source(
    "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    "https://arxiv.org/abs/2401.08417",
    "xu2024cpo",
    "Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin and "
    "Murray, Kenton and Kim, Young Jin",
    2024,
)
SIMPO = _source(
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "https://arxiv.org/abs/2405.14734",
    "meng2024simpo",
    "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
    2024,
)
GKD = _source(
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "https://arxiv.org/abs/2306.13649",
    "agarwal2024gkd",
    "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and Geist, Matthieu "
    "and Bachem, Olivier",
    2024,
)
TRL = Source("TRL, GKDTrainer and its generalised JSD", "https://github.com/huggingface/trl")
DISTILLM = _source(
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    "https://arxiv.org/abs/2402.03898",
    "ko2024distillm",
    "Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
    2024,
)
FDISTILL = _source(
    "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    "https://arxiv.org/abs/2307.15190",
    "wen2023fdistill",
    "Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili",
    2023,
)
ABKD = _source(
    "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via α-β-Divergence",
    "https://arxiv.org/abs/2505.04560",
    "wang2025abkd",
    "Wang, Guanghui and Yang, Zhiyong and Wang, Zitai and Wang, Shi and Xu, Qianqian and Huang, Qingming",
    2025,
)
JEFFREYS = _source(
    "An invariant form for the prior probability in estimation problems",
    "https://doi.org/10.1098/rspa.1946.0056",
    "jeffreys1946invariant",
    "Jeffreys, Harold",
    1946,
)
SAMPLED_KD = _source(
    "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
    "https://arxiv.org/abs/2503.16870",
    "anshumann2025sparse",
    "Anshumann and Zaidi, Mohd Abbas and Kedia, Akhil and Ahn, Jinwoo and Kwon, Taehwak and Lee, Kangwook and Lee, "
    "Haejun and Lee, Joohyung",
    2025,
)
TODI = _source(
    "ToDi: Token-wise Distillation via Fine-Grained Divergence Control",
    "https://arxiv.org/abs/2505.16297",
    "jung2025todi",
    "Jung, Seongryong and Yoon, Suwan and Kim, DongGeon and Lee, Hwanhee",
    2025,
)
DKD = _source(
    "Decoupled Knowledge Distillation",
    "https://arxiv.org/abs/2203.08679",
    "zhao2022dkd",
    "Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
    2022,
)
TAID = _source(
    "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
    "https://arxiv.org/abs/2501.16937",
    "shing2025taid",
    "Shing, Makoto and Misaki, Kou and Bao, Han and Yokoi, Sho and Akiba, Takuya",
    2025,
)
IMITKD = _source(
    "Autoregressive Knowledge Distillation through Imitation Learning",
    "https://arxiv.org/abs/2009.07253",
    "lin2020imitkd",
    "Lin, Alexander and Wohlwend, Jeremy and Chen, Howard and Lei, Tao",
    2020,
)
BA_CARUANA = _source(
    "Do Deep Nets Really Need to be Deep?",
    "https://arxiv.org/abs/1312.6184",
    "ba2014deep",
    "Ba, Lei Jimmy and Caruana, Rich",
    2014,
)
KIM_MSE = _source(
    "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
    "https://arxiv.org/abs/2105.08919",
    "kim2021comparing",
    "Kim, Taehyeon and Oh, Jaehoon and Kim, NakYil and Cho, Sangwook and Yun, Se-Young",
    2021,
)
BILD = _source(
    "BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation",
    "https://arxiv.org/abs/2406.13555",
    "li2024bild",
    "Li, Minchong and Zhou, Feng and Song, Xiaohui",
    2024,
)
APO = _source(
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "https://arxiv.org/abs/2408.06266",
    "doosterlinck2024apo",
    "D'Oosterlinck, Karel and others",
    2024,
)
ORPO = _source(
    "ORPO: Monolithic Preference Optimization without Reference Model",
    "https://arxiv.org/abs/2403.07691",
    "hong2024orpo",
    "Hong, Jiwoo and Lee, Noah and Thorne, James",
    2024,
)
PLAD = _source(
    "PLaD: Preference-based Large Language Model Distillation with Pseudo-Preference Pairs",
    "https://arxiv.org/abs/2406.02886",
    "zhang2024plad",
    "Zhang, Rongzhi and others",
    2024,
)
RDPO = _source(
    "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    "https://arxiv.org/abs/2403.00409",
    "chowdhury2024robust",
    "Ray Chowdhury, Sayak and Kini, Anush and Natarajan, Nagarajan",
    2024,
)
SLIC = _source(
    "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    "https://arxiv.org/abs/2305.10425",
    "zhao2023slichf",
    "Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and Liu, Peter J.",
    2023,
)
SMAUG = _source(
    "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    "https://arxiv.org/abs/2402.13228",
    "pal2024smaug",
    "Pal, Arka and Karkhanis, Deep and Dooley, Samuel and Roberts, Manley and Naidu, Siddartha and White, Colin",
    2024,
)
ON_POLICY = Source(
    "On-Policy Distillation (Thinking Machines, blog of October 2025)",
    "https://thinkingmachines.ai/blog/on-policy-distillation",
)
ULD = _source(
    "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    "https://arxiv.org/abs/2402.12030",
    "boizard2024uld",
    "Boizard, Nicolas and El Haddad, Kevin and Hudelot, Céline and Colombo, Pierre",
    2024,
)
GOLD = _source(
    "Unlocking On-Policy Distillation for Any Model Family",
    "https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation",
    "patino2025unlocking",
    "Patiño, Carlos Miguel and Rasul, Kashif and Gallouédec, Quentin and Burtenshaw, Ben and Paniego, Sergio and "
    "Srivastav, Vaibhav and Frere, Thibaud and Beeching, Ed and Tunstall, Lewis and von Werra, Leandro and Wolf, "
    "Thomas",
    2025,
)
TRL_GOLD = Source("TRL 1.16, GOLDTrainer", "https://github.com/huggingface/trl")
TRL_PREFERENCE = Source("TRL, DPOTrainer, CPOTrainer and ORPOTrainer", "https://github.com/huggingface/trl")
DPO = _source(
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "https://arxiv.org/abs/2305.18290",
    "rafailov2023dpo",
    "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and Finn, "
    "Chelsea",
    2023,
)
EXO = _source(
    "Towards Efficient Exact Optimization of Language Model Alignment",
    "https://arxiv.org/abs/2402.00856",
    "ji2024exo",
    "Ji, Haozhe and Lu, Cheng and Niu, Yilin and Ke, Pei and Wang, Hongning and Zhu, Jun and Tang, Jie and Huang, "
    "Minlie",
    2024,
)
RSO = _source(
    "Statistical Rejection Sampling Improves Preference Optimization",
    "https://arxiv.org/abs/2309.06657",
    "liu2023rso",
    "Liu, Tianqi and Zhao, Yao and Joshi, Rishabh and Khalman, Misha and Saleh, Mohammad and Liu, Peter J. and Liu, "
    "Jialu",
    2023,
)
DADPO = _source(
    "daDPO: Distribution-Aware DPO for Distilling Conversational Abilities",
    "https://arxiv.org/abs/2506.15717",
    "zhang2025dadpo",
    "Zhang, Zhengze and Wang, Shiqi and Shen, Yiqun and Guo, Simin and Lin, Dahua and Wang, Xiaoliang and Nguyen, "
    "Cam-Tu and Tan, Fei",
    2025,
)
KL_APPROXIMATION = Source(
    "Approximating KL Divergence (John Schulman, blog of March 2020)", "https://joschu.net/blog/kl-approx.html"
)
KL_PITFALLS = _source(
    "On a few pitfalls in KL divergence gradient estimation for RL",
    "https://arxiv.org/abs/2506.09477",
    "tang2025pitfalls",
    "Tang, Yunhao and Munos, Rémi",
    2025,
)
FITNETS = _source(
    "FitNets: Hints for Thin Deep Nets",
    "https://arxiv.org/abs/1412.6550",
    "romero2015fitnets",
    "Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and "
    "Bengio, Yoshua",
    2015,
)
TINYBERT = _source(
    "TinyBERT: Distilling BERT for Natural Language Understanding",
    "https://arxiv.org/abs/1909.10351",
    "jiao2020tinybert",
    "Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang and "
    "Liu, Qun",
    2020,
)
DISTILBERT = _source(
    "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    "https://arxiv.org/abs/1910.01108",
    "sanh2019distilbert",
    "Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas",
    2019,
)
DISTILLM2 = _source(
    "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs",
    "https://arxiv.org/abs/2503.07067",
    "ko2025distillm2",
    "Ko, Jongwoo and Chen, Tianyi and Kim, Sungnyun and Ding, Tianyu and Liang, Luming and Zharkov, Ilya and "
    "Yun, Se-Young",
    2025,
)
SPECULATIVE_KD = _source(
    "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
    "https://arxiv.org/abs/2410.11325",
    "xu2024skd",
    "Xu, Wenda and Han, Rujun and Wang, Zifeng and Le, Long T. and Madeka, Dhruv and Li, Lei and Wang, William Yang "
    "and Agarwal, Rishabh and Lee, Chen-Yu and Pfister, Tomas",
    2024,
)
