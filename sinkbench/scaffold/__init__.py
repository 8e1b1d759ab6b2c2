"""``sinkbench plugins new``: the package of a new plugin, from the templates in this folder."""
