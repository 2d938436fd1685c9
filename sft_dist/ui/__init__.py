"""Pages of this machine on which to plan, audit, watch and compare: the commands, for the browser. Imports no torch."""
