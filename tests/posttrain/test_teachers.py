"""Teachers in other processes, whose scores are those of this one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nautilus.posttrain.remote import model_of, parts_of
from nautilus.posttrain.teachers import TeacherActors
from nautilus.runtime import UserError
from tests.posttrain.test_crew import tiny, words

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_score_as_this_one_does_and_one_that_dies_is_replaced():
    """In a process of its own, as Ray reads the environment when it is imported."""
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-m", "tests.posttrain.scorers"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("batches") > 3 and all(told.values()), told


def test_a_model_is_made_again_from_its_parts():
    model = tiny(words(), 3)
    again = model_of(parts_of(model))
    assert again.config == model.config and not any(one.requires_grad for one in again.parameters())
    assert all((one == again.state_dict()[name]).all() for name, one in model.state_dict().items())


def test_processes_that_go_on_dying_end_the_run():
    class Dead(Exception):
        pass

    class Ray:
        exceptions = type("exceptions", (), {"RayActorError": Dead})
        put = staticmethod(lambda value: value)
        cluster_resources = staticmethod(dict)

        def remote(self, **_):
            actor = type("Actor", (), {"score": type("Score", (), {"remote": staticmethod(lambda *asked: None)})})
            return lambda kind: type("Kind", (), {"remote": staticmethod(lambda *given: actor())})

        def get(self, _):
            raise Dead

    with pytest.raises(UserError, match="died 3 times in a row"):
        TeacherActors(Ray(), 2, {})([("one", None)])  # type: ignore[list-item]
