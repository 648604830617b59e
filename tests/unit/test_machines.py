"""What docs/machines tells users to run is well formed, and names options that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import typer
import yaml

from apb.cli.main import app

FOLDER = Path(__file__).parents[2] / "docs" / "machines"
GENERATE = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
OPTIONS = {name for parameter in GENERATE.params for name in parameter.opts}


def test_the_manifest() -> None:
    """A Service and an indexed Job that belong together: names, ports, as many pods as torchrun expects machines."""
    service, job = yaml.safe_load_all((FOLDER / "job.yaml").read_text())
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    container = pod["containers"][0]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"] if "=" in argument)
    assert int(given["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(given["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["master-addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(given["master-port"]) == service["spec"]["ports"][0]["port"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    ours = container["args"][container["args"].index("generate") + 1 :]
    assert {argument.split("=")[0] for argument in ours} <= OPTIONS


def test_the_batch_script() -> None:
    """Bash reads it, and our options are those of the command."""
    subprocess.run(["bash", "-n", str(FOLDER / "apb.sbatch")], check=True)
    ours = (FOLDER / "apb.sbatch").read_text().split(" generate ")[1]
    assert set(re.findall(r"--[a-z-]+", ours)) <= OPTIONS
