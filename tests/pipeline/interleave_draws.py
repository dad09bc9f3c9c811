"""Random problems: lanes of tasks with transfers among them, and memory."""

from hypothesis import strategies as st

from ftc.pipeline.interleave_tasks import COMPUTE, START, WAIT, Problem, Storage, Task


@st.composite
def problems(draw, max_tasks: int = 14) -> Problem:
    """One to three lanes (some tasks in none), each task behind a few earlier ones of any lane or of its own; costs may be 0."""
    number = lambda most: draw(st.integers(0, most))  # noqa: E731
    lanes, crossing = 1 + number(2), draw(st.booleans())
    tasks: list[Task] = []
    for lane in range(lanes):
        own: list[int] = []
        for _ in range(1 + number(max_tasks - 1)):
            pool = list(range(len(tasks))) if crossing and number(4) == 0 else own
            needs = tuple(sorted({pool[-1 - number(min(len(pool), 5) - 1)] for _ in range(number(2))})) if pool else ()
            name = f"lane {lane}" if number(9) else None
            if number(3) == 0:
                start = len(tasks)
                tasks.append(Task(START, number(40) / 8, needs, f"channel {number(1)}", lane=name))
                tasks.append(Task(WAIT, 0.0, (start,), start=start, lane=name))
                own.append(start + 1)
            else:
                tasks.append(Task(COMPUTE, number(16) / 8, needs, lane=name))
                own.append(len(tasks) - 1)
    plain = Problem(tuple(tasks))
    storages = [Storage(number(9), i, plain.followers[i], kept=number(5) == 0) for i, task in enumerate(tasks) if task.kind != WAIT]
    storages += [Storage(number(9), None, tuple(sorted({number(len(tasks) - 1) for _ in range(2)})), kept=draw(st.booleans())) for _ in range(number(3))]
    return Problem(tuple(tasks), tuple(storages))


def topological(problem: Problem, order) -> bool:
    """Whether an order has every task once, behind what it needs."""
    place = {number: i for i, number in enumerate(order)}
    return sorted(order) == list(range(len(problem.tasks))) and all(place[n] < place[i] for i, t in enumerate(problem.tasks) for n in t.needs)
