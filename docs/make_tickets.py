import csv
import random

random.seed(0)
things = ["invoice", "payment", "card", "order", "parcel", "account", "password", "app", "subscription"]
phrases = {
    "billing": ["I was charged twice for my {}", "the amount on the {} is wrong", "please refund the {}"],
    "delivery": ["my {} has not arrived", "the {} came to the wrong address", "when will the {} be here"],
    "technical": ["the {} page shows an error", "I cannot log in to see my {}", "the {} freezes on my phone"],
}
openings = ["Hello, ", "Hi, ", "Good morning, ", "", "For the third time: "]
with open("tickets.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["ticket", "team"])
    for _ in range(1200):
        team = random.choice(list(phrases))
        text = random.choice(openings) + random.choice(phrases[team]).format(random.choice(things))
        if random.random() < 0.05:  # people make mistakes
            team = random.choice(list(phrases))
        writer.writerow([text, team])
