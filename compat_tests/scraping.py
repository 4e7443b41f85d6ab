"""What a test reads off a scrape of `/metrics`, by the parser of Prometheus' own library."""

from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """One scrape: families by name, and sums of samples."""

    def __init__(self, text):
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name, **labels):
        """The sum of all samples of that name (without the prefix) whose labels agree."""
        wanted = labels.items()
        return sum(s.value for s in self.samples if s.name == f"helix:{name}" and wanted <= s.labels.items())

    @property
    def names(self):
        """Families with our prefix, as WIRE.md spells them: counters end with ``_total``."""
        ours = [family for family in self.families.values() if family.name.startswith("helix:")]
        return {f.name.removeprefix("helix:") + ("_total" if f.type == "counter" else "") for f in ours}
