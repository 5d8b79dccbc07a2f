"""The packaged model "emoji": fetch the icon sets, draw and caption them, make the text encoder, train, package."""
