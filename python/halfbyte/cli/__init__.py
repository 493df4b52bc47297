"""The command line: `halfbyte VERB`. One module a verb, imported when it runs."""
