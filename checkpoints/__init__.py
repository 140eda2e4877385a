"""How state is kept: state type, layout, writer, reader, manifest, commit, retention."""
