"""A finished run for others: its model and card on the Hugging Face hub, or as one GGUF file for llama.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dpkd.errors import DpkdError
from dpkd.io import whole_file
from dpkd.run_folder import RunFolder

CONVERTER = "convert_hf_to_gguf.py"


def push(run: Path, repository: str, *, private: bool = False, adapter: bool = False) -> str:
    """Upload the model, or with `adapter` the adapters alone, and the card in one commit; returns the commit's address.

    `repository` is OWNER/NAME and is made where it does not exist. The token is that of `hf auth login` or HF_TOKEN;
    HF_ENDPOINT names another hub. Raises DpkdError when the run is not finished, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder = RunFolder.existing(run)
    if repository.count("/") != 1:
        raise DpkdError(f"{repository} is not a name for the hub: expected OWNER/NAME")
    source = _part(folder, "adapter" if adapter else "model")
    files = {file.name: file for file in sorted(source.iterdir()) if file.is_file() and file.name != "README.md"}
    if folder.card.is_file():
        files["README.md"] = folder.card
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)  # read now: the library reads it when it is imported
    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=f"{source.name} of {folder.path.name}")
    except HFValidationError as error:
        raise DpkdError(f"{repository} is not a name for the hub: expected OWNER/NAME ({error})") from error
    except Exception as error:
        # Without a network it is an error of httpx, or of httpx2 in later versions of the hub's package.
        refused = isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled | HfHubHTTPError)
        if not refused and not type(error).__module__.startswith("httpx"):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DpkdError(
            f"{repository}: {api.endpoint or constants.ENDPOINT} does not take the model: {first}. Log in with "
            "`hf auth login` (a token that may write), and check the network, the owner's name and HF_HUB_OFFLINE"
        ) from error
    return str(commit.commit_url)


def export_gguf(run: Path, output: Path | None = None, *, outtype: str = "f16", converter: Path | None = None) -> Path:
    """Write the model as one GGUF file with llama.cpp's converter; returns the file (default: RUN/model-TYPE.gguf).

    The converter is a file, or is found in the folder LLAMA_CPP or on PATH. Raises DpkdError when there is none, or
    when it fails.
    """
    folder = RunFolder.existing(run)
    model, script = _part(folder, "model"), _converter(converter)
    target = output or folder.path / f"model-{outtype}.gguf"
    with whole_file(target) as unfinished:
        command = [sys.executable, str(script), str(model), "--outfile", str(unfinished), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not unfinished.stat().st_size:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise DpkdError(
                f"{script} failed with exit code {done.returncode}: {said[-1] if said else 'it says nothing'}. "
                f"To see all of it: {' '.join(command)}"
            )
    return target


def _part(folder: RunFolder, name: str) -> Path:
    """A folder of weights of a run. Raises DpkdError when it is not there."""
    part = folder.path / name
    if not folder.model.is_dir():
        raise DpkdError(f"{folder.path} is not finished: it has no model yet. Go on: dpkd train --resume {folder.path}")
    if not part.is_dir():
        raise DpkdError(f"{folder.path} has no {name}: it trained no adapters (student.lora)")
    return part


def _converter(given: Path | None) -> Path:
    home = os.environ.get("LLAMA_CPP")
    on_path = shutil.which(CONVERTER)
    tried = [given, Path(home) / CONVERTER if home else None, Path(on_path) if on_path else None]
    found = next((path for path in tried if path is not None), None)
    if found is not None and found.is_file():
        return found
    missing = f"{found} does not exist" if found is not None else f"{CONVERTER} is neither on PATH nor in LLAMA_CPP"
    raise DpkdError(
        f"GGUF is written by llama.cpp's converter, and {missing}. Get it: git clone "
        "https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements/"
        f"requirements-convert_hf_to_gguf.txt; then give --converter llama.cpp/{CONVERTER}"
    )
