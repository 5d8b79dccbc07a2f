"""Drawing for others: a queue, a server in the shape of OpenAI's, and a page to draw on."""
