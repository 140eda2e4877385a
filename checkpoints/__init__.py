"""How state is saved: state type, layout, writer, reader, manifest, commit, retention."""
