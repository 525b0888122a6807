"""Push a finished run to the Hugging Face Hub, with a model card made from what the run measured.

    python recipes/push_to_hub.py --output_dir runs/embedded --repo_id you/smollm2-plus-lora --dry_run
    python recipes/push_to_hub.py --output_dir runs/embedded --repo_id you/smollm2-plus-lora --private
    python recipes/push_to_hub.py --output_dir runs/embedded --repo_id you/smollm2-plus --merged
    python recipes/push_to_hub.py --output_dir runs/embedded --repo_id you/smollm2-plus-lora --reward_repo_id you/reward

What goes there: the policy adapter (or the merged model), tokenizer and chat template, config.yaml, metrics.jsonl,
summary.json, curves.png, a model card (README.md), and run.json, which says which run it is. What does not: sampled
answers, the data, the value adapter, and every path of this machine. The licence is the base model's.

One commit and one tag (run-…, which follows from the weights). The same command again does nothing if every file is
there as it was pushed; after an interruption it goes on; with new figures (say, of recipes/evaluate.py) it updates the
card; what was deleted or edited on the Hub since it puts back ("repaired"). Each of these is one commit more, and the
tag stays at the first. What another run has put into the repository is left alone without --force.

The token is read from HF_TOKEN, or from the login that `hf auth login` keeps. It is back in three lines:

    from lora_rlhf import load_plus

    model, tokenizer = load_plus("you/smollm2-plus-lora")
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_rlhf.errors import UserError
from lora_rlhf.hub.card_code import load_plus_lines
from lora_rlhf.hub.folder import HubFolder, hub_folder
from lora_rlhf.hub.model_card import Kind
from lora_rlhf.hub.push import check_repo_id, push
from lora_rlhf.terminal import heading, note, run_recipe


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/embedded"), help="the run [%(default)s]")
    add("--repo_id", required=True, metavar="OWNER/NAME", help="where it goes; created where it is missing")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--merged", action="store_true", help="push the merged 16-bit model in place of the adapter")
    add("--reward_repo_id", metavar="OWNER/NAME", help="push the reward adapter too, to a repository of its own")
    add("--force", action="store_true", help="replace what another run has put there, in one commit")
    add("--dry_run", action="store_true", help="write what would be pushed to OUTPUT_DIR/hub and print the cards")
    return parser


def main() -> None:
    given = arguments().parse_args()
    wanted: dict[Kind, str] = {"merged" if given.merged else "adapter": given.repo_id}
    check_repo_id(given.repo_id)
    if given.reward_repo_id:
        check_repo_id(given.reward_repo_id, "--reward_repo_id")
        if given.reward_repo_id == given.repo_id:
            raise UserError("--reward_repo_id: the reward adapter needs a repository of its own, not that of --repo_id")
        wanted["reward"] = given.reward_repo_id
    # every folder is made before anything is sent, so that a run that lacks a part sends nothing
    folders = {repo: hub_folder(given.output_dir, kind, repo, not given.dry_run) for kind, repo in wanted.items()}
    for repo_id, folder in folders.items():
        heading("hub", f"{folder.kind} of {given.output_dir} → {repo_id}")
        list_files(folder)
        if given.dry_run:
            note(f"\n{folder.card}\nnothing was sent: what would be pushed is in {folder.path}, as {folder.tag}")
            continue
        pushed = push(folder, repo_id, private=given.private, force=given.force)
        note(f"  {pushed.text}")
        if folder.kind != "reward":
            note("\n".join(["", *load_plus_lines(repo_id, folder.origin)]))


def list_files(folder: HubFolder) -> None:
    for name, size in folder.sizes().items():
        note(f"  {size / 2**20:10.3f} MiB  {name}")
    if folder.origin.licence is None:
        note("  the base model's licence is not known here: the card says so, and a push looks on the Hub first")


if __name__ == "__main__":
    run_recipe(main)
