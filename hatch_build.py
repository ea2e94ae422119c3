"""The book's records go into the wheel, where there is no checkout to read them from; an editable
install has one."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Records(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "standard":
            build_data["force_include"]["figures/results"] = "bpfree/figures/results"
