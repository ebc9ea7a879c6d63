# SPDX-License-Identifier: Apache-2.0
"""Trains all stages of a model on this machine, each from the last checkpoint of the one before.

    megatron-keye run_stages keye_tiny --ranks 1
    megatron-keye run_stages keye_tiny --ranks 1 --from stage3 --to sft --set training.steps=20
    megatron-keye run_stages keye --submit --weights runs/warm_start --sbatch=--time=24:00:00
    megatron-keye run_stages keye --status

A stage is a recipe, MODEL_STAGE, and a run of that name. A second call goes on where the first one
stopped, between stages or within one; Ctrl-C, TERM and USR1 save before they stop, as in
megatron-keye train. A table shows what is done, and MODEL_stages.svg in output_dir the loss, the
indexer's KL divergence and its recall over all stages. --submit submits the stages as Slurm jobs
instead, each of which waits for the one before; --print prints the commands. Where jobs may not
queue again, --sbatch=--array=1-9%1 gives each stage nine tasks that continue each other.

Exit status: 0 done, else that of megatron-keye train in the stage that stopped.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli import local
from megatron_keye.cli.arguments import add_count, add_folder, add_settings, make_parser
from megatron_keye.cli.shared_heartbeats import shared_heartbeats
from megatron_keye.cli.stage_plan import PlannedStage, plan_stages
from megatron_keye.cli.stage_report import draw_stages, print_table, read_curves
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.cli.train import default_ranks
from megatron_keye.errors import UserError
from megatron_keye.recipes.stages import CHAINS, STAGES

_SCRIPT = """\
#!/usr/bin/env bash
# Each job starts when the one before is done, and goes on from what it saved itself.
set -euo pipefail
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye run_stages", __doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "model", metavar="MODEL", choices=CHAINS, help=f"one of {', '.join(CHAINS)}"
    )
    add_settings(parser, "change a setting of every stage; repeatable")
    stages = f"one of {', '.join(names)}"
    parser.add_argument(
        "--from", dest="first", choices=names, metavar="STAGE", help=f"first stage, {stages}"
    )
    parser.add_argument("--to", dest="last", choices=names, metavar="STAGE", help="last stage")
    add_folder(parser, "--weights", "checkpoint that the first stage starts from")
    add_count(parser, "--ranks", "processes of each stage; default: as for megatron-keye train")
    parser.add_argument("--status", action="store_true", help="show what is done; train nothing")
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--print", action="store_true", help="print a script of Slurm jobs")
    jobs.add_argument("--submit", action="store_true", help="run that script")
    add_count(parser, "--gpus-per-node", "for Slurm jobs: GPUs of a node", default=8)
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="for Slurm jobs: an option of sbatch; repeatable",
    )
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Walk the stages, or print or submit their jobs, and return the exit status."""
    options = parse_arguments(arguments)
    if options.print or options.submit:
        stages = plan_stages(options, ranks=options.ranks or 0, has_gpu=True)
        script = job_script(stages, options.gpus_per_node, options.sbatch)
        if options.submit:
            return submit(script)
        sys.stdout.write(script)
        return 0
    if options.status:
        show(options.model, plan_stages(options, ranks=options.ranks or 0, has_gpu=True))
        return 0
    ranks = options.ranks or default_ranks()
    return walk(options.model, plan_stages(options, ranks=ranks, has_gpu=local.count_gpus() > 0))


def walk(model: str, stages: Sequence[PlannedStage]) -> int:
    """Train what is left of the stages and return the exit status.

    Raises:
        UserError: When the first stage has no weights to start from, or a stage was begun from
            others than those of the stage before.
    """
    first = stages[0]
    if first.before is not None and not first.before.is_done:
        raise UserError(
            f"--from: got the stage {first.recipe}, expected that {first.before.recipe} is done, "
            f"but {first.before.last_checkpoint} is not there; begin with an earlier stage, or "
            "give --weights"
        )
    for stage in stages:
        stage.check_beginning()
    for number, stage in enumerate(stages, start=1):
        if stage.is_done:
            continue
        sys.stdout.write(f"stage {number} of {len(stages)}: {stage.recipe}\n")
        sys.stdout.flush()
        words = ["train", *stage.words, "--ranks", str(stage.ranks)]
        with shared_heartbeats():
            status = local.launch([sys.executable, "-m", "megatron_keye", *words], stage.ranks)
        if status:
            sys.stderr.write(f"{stage.recipe} has stopped; the same command goes on with it\n")
            show(model, stages)
            return status
    show(model, stages)
    return 0


def show(model: str, stages: Sequence[PlannedStage]) -> None:
    """Print the table of stages and draw their curves."""
    curves = [read_curves(stage.run.folder) for stage in stages]
    print_table(model, stages, curves)
    file = draw_stages(model, stages, curves)
    if file is not None:
        sys.stdout.write(f"{file}\n")


def submit(script: str) -> int:
    """Run the script of `job_script` and return its exit status.

    Raises:
        UserError: Where there is no Slurm, or no launch/slurm.sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--submit: sbatch is not found, expected Slurm; --print prints the jobs")
    if not Path("launch/slurm.sbatch").is_file():
        raise UserError(
            f"--submit: got folder {Path.cwd()}, expected the repository, which has "
            "launch/slurm.sbatch; call it there"
        )
    return subprocess.run(["bash", "-c", script], check=False).returncode


def job_script(
    stages: Sequence[PlannedStage], gpus_per_node: int, sbatch_options: Sequence[str]
) -> str:
    """Return a shell script that submits each stage as a job after the one before.

    Raises:
        UserError: When a stage's ranks do not fill its nodes.
    """
    lines = [_SCRIPT]
    for number, stage in enumerate(stages):
        gpus = min(gpus_per_node, stage.ranks)
        if stage.ranks % gpus:
            raise UserError(
                f"--gpus-per-node: got {gpus_per_node}, expected a divisor of the {stage.ranks} "
                f"ranks of {stage.recipe}"
            )
        after = ["--dependency=afterok:$job", "--kill-on-invalid-dep=yes"] if number else []
        options = [
            *("--parsable", f"--job-name={stage.recipe}"),
            *(f"--nodes={stage.ranks // gpus}", f"--gpus-per-node={gpus}"),
            *sbatch_options,
        ]
        lines.append(
            f"job=$(sbatch {' '.join([*after, shlex.join(options)])} \\\n"
            f"  launch/slurm.sbatch {shlex.join(stage.words)})\n"
            f'echo "{stage.recipe}: job $job"\n'
        )
    return "\n".join(lines)
