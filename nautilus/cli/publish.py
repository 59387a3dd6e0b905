"""Send a model folder to the hub: checked first, shown with dry_run=true, gone on with where an upload stopped.

MODEL is a run or a checkpoint folder. Its config, tokenizer and card must be there and its tensors complete, by the
headers of their files. Hidden files are never sent. The token is that of `hf auth login` or of HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nautilus import checkpoint_of
from nautilus.config import setting
from nautilus.data.tokenizer import load_tokenizer
from nautilus.model.weights import check_folder
from nautilus.runtime import HUB_ID, UserError, read_text

NO_TOKEN = (
    "no token for the hub here: run `hf auth login`, or set HF_TOKEN to a token that may write to {repo}"
    " (https://huggingface.co/settings/tokens); dry_run=true needs none"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "a run or a checkpoint folder")
    repo: str = setting("", "where to: owner/name; made if it is not there")
    private: bool = setting(True, "a repository that is made is seen by its owner alone")
    message: str = setting("Upload with Nautilus", "of the commit")
    dry_run: bool = setting(False, "check and show what would be sent, and stop")


def main(settings: Settings) -> None:
    if not settings.model or not HUB_ID.fullmatch(settings.repo):
        raise UserError(
            f"cannot publish {settings.model!r} to repo={settings.repo!r}: name a folder and owner/name, as in"
            " nautilus publish runs/demo repo=me/my-model"
        )
    folder = Path(checkpoint_of(settings.model))
    files = checked(folder)
    say = Console(soft_wrap=True, highlight=False).print
    for name, size in files.items():
        say(f"{size:>16,}  {name}", markup=False)
    where = f"{len(files)} files, {sum(files.values()):,} bytes: {folder} → {settings.repo}"
    if settings.dry_run:
        say(f"{where}; dry_run=true, nothing was sent", markup=False)
    else:
        say(where, markup=False)
        say(f"published: {upload(folder, list(files), settings)}", markup=False)


def checked(folder: Path) -> dict[str, int]:
    """The files to send with their sizes, once the folder is one that others can open."""
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} to publish; give a run or a checkpoint folder")
    check_folder(folder)
    load_tokenizer(folder)
    card = read_text(folder / "README.md", "a model needs a card to be published: write one, or save the model again")
    if not card.startswith("---\n") or "\n---" not in card[4:]:
        raise UserError(
            f"{folder / 'README.md'} does not begin with a block of ---, which the hub reads; put one at its top"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    return {
        names[path].as_posix(): path.stat().st_size
        for path in files
        if not any(part.startswith(".") for part in names[path].parts)
    }


def upload(folder: Path, names: list[str], settings: Settings) -> str:
    """The address of the commit. Called again after a cut it sends only what the hub has not yet."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    if huggingface_hub.get_token() is None:
        raise UserError(NO_TOKEN.format(repo=settings.repo))
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(settings.repo, private=settings.private, exist_ok=True)
        exactly = [glob_safe(name) for name in names]
        done = hub.upload_folder(
            repo_id=settings.repo, folder_path=folder, allow_patterns=exactly, commit_message=settings.message
        )
    except (HTTPError, HFValidationError, OSError) as bad:
        what = "refused it" if isinstance(bad, HfHubHTTPError | HFValidationError) else "could not be reached"
        raise UserError(
            f"cannot publish {folder} to {settings.repo}: the hub {what} ({type(bad).__name__}:"
            f" {str(bad).partition(chr(10))[0]}); check the name, the token's rights and the network, and give the same"
            " command again: what has arrived is not sent twice"
        ) from bad
    return str(done.commit_url)


def glob_safe(name: str) -> str:
    """The pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
