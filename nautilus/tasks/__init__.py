"""Tasks: problems to put to a model, and who judges what it says. Rewards in training, scores in evaluation."""

from nautilus.tasks.task import Call, Episode, GraderBroken, Problem, Question, Reply, Task, Verdict, distinct

__all__ = ["Call", "Episode", "GraderBroken", "Problem", "Question", "Reply", "Task", "Verdict", "distinct"]
