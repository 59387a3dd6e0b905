"""What was recorded stands in the prompts as it was, and what the agent did is what is to come."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nautilus.eval.public_sets import read_set
from nautilus.runtime import UserError

CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
TRACE = [
    {"role": "system", "content": "You repair code.", "tool_calls": None},
    {"role": "user", "content": "Mend it.", "tool_calls": None},
    {"role": "assistant", "content": "I look around.", "tool_calls": [CALL]},
    {"role": "tool", "content": "a.py b.py", "tool_calls": None},
    {"role": "assistant", "content": "There are a.py and b.py.", "tool_calls": []},
]


@pytest.mark.parametrize("fields", [("run_id", "messages"), ("trajectory_id", "trajectory")])
def test_a_trace_of_openhands_is_a_prompt_for_each_turn_of_the_agent(tmp_path, fields):
    run, messages = fields
    row = {"instance_id": "django-1", run: "r1", messages: TRACE, "resolved": True, "tools": '[{"type": "function"}]'}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    first, second = read_set("swebench_openhands", path)
    assert first.id == "django-1/r1/1" and first.family == "code" and len(first.messages) == 2
    assert first.reference == 'I look around.\n{"name": "bash", "arguments": {"command": "ls"}}'
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "tool"]
    # What was recorded stands in the next prompt as it was asked for: a replay sees what the agent saw.
    assert f"Assistant:\n{first.reference}\n\nTool:\na.py b.py\n\n" in second.text and len(first.tools) == 1
    assert second.text.endswith("Assistant:\n") and second.reference == "There are a.py and b.py."


def test_a_trajectory_of_swe_agent_leaves_out_demonstrations(tmp_path):
    shown = {"role": "assistant", "content": "As an example.", "agent": "primary", "is_demo": True}
    thought = {"role": "assistant", "content": "ls", "thought": "t", "action": "ls", "agent": "primary"}
    seen = {"role": "user", "content": "a.py", "agent": "primary"}
    history = [{"role": "system", "content": "S"}, shown, seen, thought, seen]
    for name in ("one.traj.json", "two.traj"):
        told = {"environment": "e", "trajectory": [], "history": history, "info": {}}
        (tmp_path / name).write_text(json.dumps(told))
    first, second = read_set("swe_agent", tmp_path)
    assert (first.id, second.id) == ("one/1", "two/1") and first.reference == "ls"
    assert [{*message} for message in first.messages] == [{"role", "content"}] * 3


@pytest.mark.parametrize("message, what", [
    ({"role": "robot", "content": "a"}, "message 3: a message has role 'robot'"),
    ({"role": "assistant", "content": 7}, "message 3: the content of a assistant message is '7'"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "message 3: arguments of"),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "message 3, a tool call, its function"),
    ({"role": "assistant", "tool_calls": ["f"]}, "message 3: a tool call is a str, not an object"),
    ("hello", "message 3 is a str, not an object"),
])  # fmt: skip
def test_a_damaged_message_is_named(tmp_path, message, what):
    (tmp_path / "one.traj").write_text(json.dumps({"history": [*TRACE[:2], message]}))
    with pytest.raises(UserError) as bad:
        [*read_set("swe_agent", tmp_path / "one.traj")]
    assert what in str(bad.value) and "one.traj line 1" in str(bad.value)
