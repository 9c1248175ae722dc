"""What a task may be called: known without torch, so that a typing error shows at once."""

from fedrounds.errors import InvalidInput
from fedrounds.plugins import validate_module

BUILT_IN_TASKS = ("mnist-sample", "mnist", "fashion-mnist", "text")
"""The tasks that a name without a colon stands for, beside `tabular,...`."""


def validate_task_name(name: str) -> None:
    """Refuse a name that no task can have here; runs no code of a task's own module.

    Raises:
        InvalidInput: the name is neither a built-in task's nor that of a module's attribute, or
            there is no such module.
    """
    if name in BUILT_IN_TASKS or name.partition(",")[0] == "tabular":
        return
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InvalidInput(
            f"there is no task {name!r}; there are: {', '.join(BUILT_IN_TASKS)}, tabular; a task "
            "of your own is named package.module:attribute"
        )
    validate_module(f"task {name!r}", module_name)
