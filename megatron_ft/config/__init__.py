"""Settings: dataclass sections, the rules between them, and how flags and YAML files fill them. Without torch."""
